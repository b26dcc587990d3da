"""A workbench leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from crailfs.bench import workbench
from crailfs.bench.workbench import Workbench
from crailfs.errors import CrailError

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]


def mounted_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines if line.split(" ")[4].startswith(f"{directory}/")]


def assert_nothing_is_left(bench: Workbench, regions: list[Path]) -> None:
    assert mounted_below(bench.directory) == []
    assert not bench.directory.exists()
    assert not bench.shared_memory.exists()
    assert [region for region in regions if region.exists()] == []


def test_everything_is_taken_down() -> None:
    with Workbench("test") as bench:
        bench.start_crail("--memory", "64MiB", "--disk", "64MiB")
        source = bench.shared_memory / "source"
        source.mkdir()
        reference = bench.start_c_reference(source)
        (reference / "file").write_text("by way of C")
        assert (source / "file").read_text() == "by way of C"
        (bench.mountpoint / "file").write_text("by way of CrailFS")
        regions = [path for path, _ in bench.state.regions().values()]
        assert len(mounted_below(bench.directory)) == 2
    assert_nothing_is_left(bench, regions)


def test_a_file_system_whose_processes_were_killed_is_taken_down() -> None:
    with Workbench("test") as bench:
        bench.start_crail("--memory", "64MiB", "--disk", "64MiB")
        regions = [path for path, _ in bench.state.regions().values()]
        running = bench.state.read_running()
        assert running is not None
        children = [each.identity.pid for each in running.processes.values() if each.identity]
        for pid in (running.supervisor.pid, *children):
            os.kill(pid, signal.SIGKILL)
    assert_nothing_is_left(bench, regions)


def has_ended(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_process_that_ignores_signals_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "_END_TIMEOUT_SECONDS", 0.5)
    stubborn = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.fork()\n"
        "os.write(1, b'%9d' % os.getpid())\n"
        "signal.pause()\n"
    )
    with Workbench("test") as bench:
        command = [sys.executable, "-c", stubborn]
        process = bench.start(command, tmp_path / "log", bench.environment)
        assert process.stdout is not None
        pids = [int(process.stdout.read(9)) for _ in range(2)]
        assert not any(has_ended(pid) for pid in pids)
    assert all(has_ended(pid) for pid in pids)


def test_a_failed_command_is_told_with_what_it_said() -> None:
    with Workbench("test") as bench, pytest.raises(CrailError, match="exit code 3: no luck"):
        bench.run(["sh", "-c", "echo no luck >&2; exit 3"], "trying", 10)
