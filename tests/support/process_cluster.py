"""A whole file system of real processes, each of which a test may kill and start again."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

from crailfs.config import ClientConfig
from crailfs.config_file import Settings
from crailfs.limits import OPERATION_TIMEOUT_MS
from crailfs.units import MIB
from tests.support.mounts import guarded, unmount
from tests.support.processes import ServerProcess, run_crail, wait_until

_CONFIGURATION = """\
[cluster]
secret_file = "{state}/secret"
metadata = "unix:{state}/metadata.sock"

[metadata]
state = "{state}/metadata"
listen = ["unix:{state}/metadata.sock", "127.0.0.1:0"]

[storage]
state = "{state}/storage"
listen = ["unix:{state}/storage.sock", "127.0.0.1:0"]

[[storage.region]]
tier = "memory"
path = "{memory}"
size = {memory_bytes}

[[storage.region]]
tier = "disk"
path = "{state}/disk.region"
size = {disk_bytes}

[client]
operation_timeout_ms = {operation_timeout_ms}

[mount]
mountpoint = "{mountpoint}"
"""


class ProcessCluster:
    """Metadata server, storage server and mount, by name: ``metadata``, ``storage``, ``mount``."""

    def __init__(self, state: Path, configuration: Path, mountpoint: Path) -> None:
        self.state = state
        self.configuration = configuration
        self.mountpoint = mountpoint
        self.running: dict[str, ServerProcess] = {}
        self._transports = ""

    def start(self, name: str, *settings: str) -> ServerProcess:
        """Start a part and wait until it is ready; ``settings`` are ``section.key=value``."""
        arguments = [name, "--config", str(self.configuration)]
        if name == "mount":
            settings = (f"client.transports={self._transports}", *settings)
        for setting in settings:
            arguments += ["--set", setting]
        process = ServerProcess(arguments, self.state / f"{name}.log")
        self.running[name] = process
        return process

    def kill(self, name: str) -> None:
        """SIGKILL; a dead mount is waited for until its watchdog has cleaned it."""
        self.running.pop(name).kill()
        if name == "mount":
            wait_until(
                lambda: not self.mountpoint.is_mount(), "the watchdog unmounted", timeout_s=20
            )

    def mount_with(self, *transports: str) -> None:
        """Mount anew, with a client that uses these transports."""
        if "mount" in self.running:
            self.running.pop("mount").stop()
        self._transports = ",".join(transports)
        self.start("mount")

    def kill_all(self) -> None:
        for process in self.running.values():
            process.kill()

    def restart(self, name: str) -> None:
        self.kill(name)
        self.start(name)

    def stop(self) -> None:
        for name in ("mount", "storage", "metadata"):
            if name in self.running:
                self.running.pop(name).stop()

    def client_config(self, *transports: str) -> ClientConfig:
        """For a client of the test's own."""
        names = ",".join(transports or ("local", "tcp"))
        return Settings.load(self.configuration, [f"client.transports={names}"]).client()

    def reclaim_blocks(self) -> int:
        """Blocks that clients which are gone may still be able to write to."""
        found = re.search(r"\breclaim_blocks (\d+)", self.crail("fsck").stdout)
        return int(found[1]) if found else 0

    def audit(self, *, data: bool = False) -> None:
        """``crail fsck`` finds no broken invariant, with ``data`` no wrong byte either."""
        options = ["--data"] if data else []
        done = self.crail("fsck", *options, timeout_s=60)
        assert done.returncode == 0, f"crail fsck: {done.stdout}{done.stderr}"

    def used_bytes(self) -> int:
        """Of all tiers, as ``crail status`` shows it: files and grants."""
        done = self.crail("status", "--json")
        assert done.returncode == 0, done.stderr
        return sum(tier["used_bytes"] for tier in json.loads(done.stdout)["tiers"])

    def umount(self) -> CompletedProcess[str]:
        return run_crail("umount", str(self.mountpoint), timeout_s=60)

    def crail(
        self, command: str, *arguments: str, timeout_s: float = 30.0
    ) -> CompletedProcess[str]:
        """Run a command about this cluster to its end."""
        return run_crail(
            command, *arguments, "--config", str(self.configuration), timeout_s=timeout_s
        )

    def log(self, name: str) -> str:
        return (self.state / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        parts = sorted(self.state.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in parts)


@contextlib.contextmanager
def process_cluster(
    base: Path,
    *,
    transports: tuple[str, ...] = ("local", "tcp"),
    memory_bytes: int = 128 * MIB,
    disk_bytes: int = 128 * MIB,
    operation_timeout_ms: int = OPERATION_TIMEOUT_MS,
    mount: bool = True,
) -> Iterator[ProcessCluster]:
    """Everything started; at the end what still runs is audited and stopped, and the memory file
    removed."""
    state = base / "state"
    mountpoint = base / "mnt"
    state.mkdir(exist_ok=True)
    mountpoint.mkdir()
    secret = state / "secret"
    secret.touch(0o600)
    secret.write_text(secrets.token_hex(32))
    memory = Path("/dev/shm") / f"crailfs-test-{secrets.token_hex(8)}"
    configuration = state / "crail.toml"
    configuration.write_text(
        _CONFIGURATION.format(
            state=state,
            memory=memory,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            mountpoint=mountpoint,
            operation_timeout_ms=operation_timeout_ms,
        )
    )
    cluster = ProcessCluster(state, configuration, mountpoint)
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(guarded(mountpoint, memory))
        cleanup.callback(cluster.kill_all)
        cleanup.callback(unmount, mountpoint)
        cluster.start("metadata")
        cluster.start("storage")
        if mount:
            cluster.mount_with(*transports)
        try:
            yield cluster
            if "metadata" in cluster.running:
                cluster.audit()
            cluster.stop()
        except BaseException:
            print(cluster.logs())
            raise
