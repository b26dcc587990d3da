"""A whole file system of real processes, each of which a test may kill and start again."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

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
transports = [{transports}]

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

    def start(self, name: str) -> ServerProcess:
        """Start a part and wait until it is ready."""
        arguments = [name, "--config", str(self.configuration)]
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

    def restart(self, name: str) -> None:
        self.kill(name)
        self.start(name)

    def stop(self) -> None:
        for name in ("mount", "storage", "metadata"):
            if name in self.running:
                self.running.pop(name).stop()

    def audit(self) -> None:
        """``crail fsck`` finds no broken invariant."""
        done = run_crail("fsck", "--config", str(self.configuration), timeout_s=60)
        assert done.returncode == 0, f"crail fsck: {done.stdout}{done.stderr}"

    def logs(self) -> str:
        parts = sorted(self.state.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in parts)


@contextlib.contextmanager
def process_cluster(
    base: Path,
    *,
    memory_bytes: int = 128 * MIB,
    disk_bytes: int = 128 * MIB,
    transports: tuple[str, ...] = ("local", "tcp"),
    mount: bool = True,
) -> Iterator[ProcessCluster]:
    """Everything started; at the end audited, stopped, and its memory file removed."""
    state = base / "state"
    mountpoint = base / "mnt"
    state.mkdir()
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
            transports=", ".join(f'"{name}"' for name in transports),
        )
    )
    cluster = ProcessCluster(state, configuration, mountpoint)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(lambda: memory.unlink(missing_ok=True))
        if mount:
            cleanup.enter_context(guarded(mountpoint))
        cleanup.callback(lambda: [process.kill() for process in cluster.running.values()])
        cleanup.callback(unmount, mountpoint)
        cluster.start("metadata")
        cluster.start("storage")
        if mount:
            cluster.start("mount")
        try:
            yield cluster
            cluster.audit()
            cluster.stop()
        except BaseException:
            print(cluster.logs())
            raise
