"""A file system over two hosts: metadata and storage on the peer, its clients here."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from crailfs.config import ClientConfig
from crailfs.config_file import Settings
from crailfs.net.client import RpcClient
from crailfs.wire.messages import (
    Audit,
    AuditReply,
    Opcode,
    Role,
    StorageStatus,
    StorageStatusReply,
)
from tests.lab.peer import Peer, PeerProcess
from tests.support.mounts import mounted
from tests.support.processes import ServerProcess

METADATA_PORT = 9060
STORAGE_PORT = 9061
STATE = "/tmp/crailfs-two-hosts"
TOO_NEAR = "CRAIL_LAB_RDMA_DEVICE"
"""A variable of the lab that ``crail`` takes for a misspelt setting."""
CRAIL = ("env", "-u", TOO_NEAR, "python3", "-m", "crailfs.cli.main")

_CONFIGURATION = """\
[cluster]
secret_file = "{state}/secret"
metadata = "{address}:9060"

[metadata]
state = "{state}/metadata"
listen = ["{address}:9060"]

[storage]
state = "{state}/storage"
listen = ["{address}:9061", "unix:{state}/storage.sock"]

[[storage.region]]
tier = "pmem"
path = "{devdax}"
overwrite = true

[client]
operation_timeout_ms = 60000
"""
_INSTALL = """\
import mmap, os, shutil, sys
state, secret, configuration, devdax = sys.argv[1:]
with mmap.mmap(os.open(devdax, os.O_RDWR), 2 << 20) as front:
    front[:] = bytes(len(front))  # looks new, whatever ran before
shutil.rmtree(state, ignore_errors=True)
os.mkdir(state)
with open(os.open(f"{state}/secret", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
    file.write(secret)
with open(f"{state}/crail.toml", "w") as file:
    file.write(configuration)
"""


class TwoHosts:
    def __init__(self, peer: Peer, directory: Path) -> None:
        self.peer = peer
        self.directory = directory
        self.configuration = directory / "crail.toml"
        self.running: dict[str, PeerProcess] = {}
        """The peer's servers, by name: ``metadata``, ``storage``."""

    @property
    def storage(self) -> PeerProcess:
        return self.running["storage"]

    def start(self, name: str, *settings: str) -> None:
        """Start a server and wait until it is ready; ``settings`` are ``section.key=value``."""
        command = [*CRAIL, name, "--config", f"{STATE}/crail.toml", "--ready-fd", "1"]
        for setting in settings:
            command += ["--set", setting]
        process = self.running[name] = self.peer.start(command)
        process.wait_for('"ready"', timeout_s=90)

    def stop(self, name: str) -> None:
        process = self.running[name]
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.output()[-3000:]
        with self.running.pop(name):
            pass  # it has ended; what ends here is the way to it

    def kill(self, name: str) -> None:
        with self.running.pop(name) as process:
            process.kill()
            process.wait(60)

    def client_config(self, *transports: str) -> ClientConfig:
        names = ",".join(transports)
        return Settings.load(self.configuration, [f"client.transports={names}"]).client()

    @contextlib.contextmanager
    def mount(
        self, mountpoint: Path, *transports: str, settings: Sequence[str] = ()
    ) -> Iterator[ServerProcess]:
        """``settings`` are ``section.key=value``."""
        names = ",".join(transports)
        options = ["--config", str(self.configuration)]
        for setting in (f"client.transports={names}", *settings):
            options += ["--set", setting]
        log = self.directory / f"{mountpoint.name}.log"
        with mounted(mountpoint, options, log) as process:
            try:
                yield process
            except BaseException:
                print(f"{mountpoint}: {log.read_text()[-3000:]}")
                raise

    def storage_status(self) -> StorageStatusReply:
        async def ask() -> object:
            return await self._ask(STORAGE_PORT, Opcode.STORAGE_STATUS, StorageStatus())

        reply = trio.run(ask)
        assert isinstance(reply, StorageStatusReply)
        return reply

    def audit(self) -> dict[str, int]:
        """The metadata server finds nothing wrong in its tables. Returns what it counted."""

        async def ask() -> object:
            return await self._ask(METADATA_PORT, Opcode.AUDIT, Audit())

        reply = trio.run(ask)
        assert isinstance(reply, AuditReply)
        assert reply.findings == ()
        return reply.counts

    async def _ask(self, port: int, opcode: Opcode, request: object) -> object:
        credentials = self.client_config("tcp").credentials
        client = RpcClient(
            f"{self.peer.address}:{port}", credentials, role=Role.OPERATOR, client_id=1
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            reply = await client.call(opcode, request, deadline_ms=30_000)  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
        return reply

    def crail_there(self, *arguments: str, timeout_s: float = 120) -> str:
        """Run a command of the peer's, which reaches the storage server as the same host."""
        command = [*CRAIL, *arguments, "--config", f"{STATE}/crail.toml"]
        return self.peer.run(command, timeout_s=timeout_s)


@contextlib.contextmanager
def two_hosts(peer: Peer, directory: Path, devdax: Path) -> Iterator[TwoHosts]:
    """``devdax`` as it is called on the peer."""
    secret = secrets.token_hex(32)

    def configuration(state: object) -> str:
        return _CONFIGURATION.format(state=state, address=peer.address, devdax=devdax)

    (directory / "secret").touch(0o600)
    (directory / "secret").write_text(secret)
    (directory / "crail.toml").write_text(configuration(directory))
    peer.python(_INSTALL, STATE, secret, configuration(STATE), str(devdax))
    hosts = TwoHosts(peer, directory)
    try:
        for name in ("metadata", "storage"):
            hosts.start(name)
        yield hosts
        for name in ("storage", "metadata"):
            hosts.stop(name)
    finally:
        for name in [*hosts.running]:
            print(f"{name}: {hosts.running[name].output()[-3000:]}")
            hosts.kill(name)
