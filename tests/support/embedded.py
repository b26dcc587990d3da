"""An embedded file system (``crail up``) for tests, of which nothing is left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from crailfs.embedded.state import Running, State
from tests.support.mounts import guarded
from tests.support.processes import killed_at_end, run_crail, wait_until

SMALL = ("--memory", "64MiB", "--disk", "64MiB")


class Embedded:
    """One mount point and one state directory, up or down, below a directory of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.state = State(directory / "state")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CRAIL_")
        } | {"CRAIL_STATE_HOME": str(directory / "home")}

    def crail(self, *arguments: str, timeout_s: float = 60.0) -> CompletedProcess[str]:
        return run_crail(*arguments, environment=self.environment, timeout_s=timeout_s)

    def up(self, *options: str) -> CompletedProcess[str]:
        state = ("--state", str(self.state.directory))
        sizes = () if self.state.exists else SMALL
        return self.crail("up", str(self.mountpoint), *state, *sizes, *options)

    def down(self, *options: str) -> CompletedProcess[str]:
        return self.crail("down", str(self.mountpoint), *options)

    def fs(self, *arguments: str) -> CompletedProcess[str]:
        return self.crail("fs", *arguments, "--at", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        done = self.crail("status", "--json", "--at", str(self.mountpoint))
        assert done.returncode == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    @property
    def running(self) -> Running:
        running = self.state.read_running()
        assert running is not None, "not up"
        return running

    def pid(self, name: str) -> int:
        """Of the metadata, storage or mount process; waits until it is ready."""
        wait_until(lambda: bool(self.running.processes[name].ready), f"{name} ready", 20.0)
        identity = self.running.processes[name].identity
        assert identity is not None
        return identity.pid

    def pids(self) -> list[int]:
        """Of all its processes that run, the supervisor first."""
        running = self.state.read_running()
        if running is None:
            return []
        identities = [each.identity for each in running.processes.values()]
        return [running.supervisor.pid, *(each.pid for each in identities if each is not None)]

    def logs(self) -> str:
        return "".join(
            f"--- {path.name}\n{path.read_text()}"
            for path in sorted(self.state.log_directory.glob("*.log"))
        )


@contextlib.contextmanager
def embedded(directory: Path) -> Iterator[Embedded]:
    """Down at first. Whatever state the block leaves it in: processes, mount, regions and state
    are removed."""
    system = Embedded(directory)
    try:
        with killed_at_end(system.pids), guarded(system.mountpoint):
            yield system
            if system.state.locked_by() is not None:
                system.down("--force")
    finally:
        system.state.destroy()
