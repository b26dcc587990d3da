"""The supervisor, over small programs instead of servers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crailfs.embedded.logs import bound_log, open_log
from crailfs.embedded.process_identity import ProcessIdentity, stop_process
from crailfs.embedded.state import Running, State
from crailfs.errors import BusyError
from tests.support.processes import is_running, killed_at_end, wait_until

READY = """
import os, signal, sys
def ready():
    os.write(int(sys.argv[2]), b'{"ready": ["here"]}\\n')
"""
STEADY = READY + "ready(); signal.pause()"
ENDS_WITH_0_ON_USR1 = (
    READY + "signal.pthread_sigmask(signal.SIG_BLOCK, [10]); ready(); signal.sigwait([10])"
)
IGNORES_TERM = READY + "signal.signal(15, signal.SIG_IGN); ready()\nwhile True: signal.pause()"
FAILS = (
    READY
    + """
os.write(int(sys.argv[2]), b'{"error": "no room in /x", "exit_code": 4}\\n'); sys.exit(4)"""
)
DIES = READY + "sys.exit(7)"

SUPERVISE = (sys.executable, "-m", "tests.cli.supervise")

pytestmark = pytest.mark.timeout(30)


class Supervised:
    def __init__(self, state: State, process: subprocess.Popen[bytes], report: dict[str, Any]):
        self.state = state
        self.process = process
        self.report = report

    @property
    def running(self) -> Running:
        running = self.state.read_running()
        assert running is not None
        return running

    def pid(self, name: str) -> int:
        """Of a process that is ready; waits until it is."""
        self.wait_ready(name)
        identity = self.running.processes[name].identity
        assert identity is not None
        return identity.pid

    def wait_ready(self, name: str) -> None:
        wait_until(lambda: bool(self.running.processes[name].ready), f"{name} ready")

    def log(self) -> str:
        return (self.state.log_directory / "supervisor.log").read_text()


@contextlib.contextmanager
def supervised(tmp_path: Path, *specs: dict[str, Any]) -> Iterator[Supervised]:
    state = State(tmp_path)
    state.log_directory.mkdir(exist_ok=True)
    reading, writing = os.pipe()
    log = open_log(state.log_directory / "supervisor.log")
    process = subprocess.Popen(
        [*SUPERVISE, str(tmp_path), str(writing), json.dumps(specs)],
        stdout=log,
        stderr=log,
        pass_fds=(writing,),
    )
    os.close(writing)
    os.close(log)

    def pids() -> list[int]:
        running = state.read_running()
        processes = running.processes.values() if running is not None else ()
        return [process.pid] + [each.identity.pid for each in processes if each.identity]

    with killed_at_end(pids), os.fdopen(reading) as report:
        yield Supervised(state, process, json.loads(report.readline()))
        if process.poll() is None:
            process.terminate()
        process.wait(15)


def test_ready_when_all_are_and_sigterm_stops_all(tmp_path: Path) -> None:
    specs = [{"name": name, "code": STEADY} for name in ("first", "second")]
    with supervised(tmp_path, *specs) as started:
        assert started.report == {"ready": "/nowhere"}
        assert started.running.processes["first"].ready == ("here",)
        assert started.running.mountpoint == "/nowhere"
        pids = [started.pid("first"), started.pid("second")]
        started.process.terminate()
        assert started.process.wait(10) == 0
        assert not any(is_running(pid) for pid in pids)
        assert started.state.read_running() is None
        log = started.log()
        assert log.index("second stopped") < log.index("first stopped")


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    specs = [{"name": name, "code": STEADY} for name in ("first", "second")]
    with supervised(tmp_path, *specs) as started:
        other = started.pid("second")
        for round_number in (1, 2):
            pid = started.pid("first")
            os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda: started.running.processes["first"].restart_count == round_number,  # noqa: B023
                "the restart is counted",
            )
            assert started.pid("first") != pid
        assert started.pid("second") == other
        assert "killed by SIGKILL; starts again in 0.1 s" in started.log()
        assert "killed by SIGKILL; starts again in 0.2 s" in started.log()


def test_a_reported_failure_to_start_reaches_the_caller(tmp_path: Path) -> None:
    specs = [{"name": "first", "code": STEADY}, {"name": "second", "code": FAILS}]
    with supervised(tmp_path, *specs) as started:
        assert started.report == {"error": "no room in /x", "exit_code": 4}
        assert started.process.wait(10) == 4
        assert started.state.read_running() is None


def test_a_death_while_starting_names_the_log(tmp_path: Path) -> None:
    with supervised(tmp_path, {"name": "first", "code": DIES}) as started:
        assert started.report["exit_code"] == 1
        assert "the first process ended while it started (exit code 7)" in started.report["error"]
        assert str(tmp_path / "log" / "first.log") in started.report["error"]


def test_a_meant_end_of_the_mount_ends_all(tmp_path: Path) -> None:
    specs: list[dict[str, Any]] = [
        {"name": "server", "code": STEADY},
        {"name": "mount", "code": ENDS_WITH_0_ON_USR1, "ends_all": True},
    ]
    with supervised(tmp_path, *specs) as started:
        server = started.pid("server")
        os.kill(started.pid("mount"), signal.SIGUSR1)
        assert started.process.wait(10) == 0
        assert not is_running(server)


def test_a_process_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    spec = {"name": "stubborn", "code": IGNORES_TERM, "stop_timeout_s": 0.2}
    with supervised(tmp_path, spec) as started:
        pid = started.pid("stubborn")
        started.process.terminate()
        assert started.process.wait(10) == 0
        assert not is_running(pid)
        assert f"stubborn (pid {pid}) has not stopped in 0.2 s: killed" in started.log()


def test_a_state_has_one_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path, {"name": "first", "code": STEADY}) as started:
        assert started.state.locked_by() == started.process.pid
        with pytest.raises(BusyError, match=rf"in use by pid {started.process.pid}"):
            State(tmp_path).lock()
        # Looking does not take it, nor make its owner lose it.
        assert started.state.locked_by() == started.process.pid
    assert State(tmp_path).locked_by() is None


def test_stop_process_leaves_a_stranger_with_the_same_pid_alone() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"])
    with killed_at_end(lambda: [process.pid]):
        identity = ProcessIdentity.of(process.pid)
        assert identity is not None
        stranger = ProcessIdentity(process.pid, identity.start_ticks - 1)
        stop_process(stranger, timeout_s=5, what="stranger")
        assert process.poll() is None
        stop_process(identity, timeout_s=5, what="ours")
        assert process.wait(5) == -signal.SIGTERM


def test_a_log_stays_bounded_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    fd = open_log(path)
    os.write(fd, b"old\n" * 1000)
    assert bound_log(path, max_bytes=400)
    os.write(fd, b"new\n")
    os.close(fd)
    assert path.read_bytes() == b"new\n"
    assert path.with_name("x.log.1").read_bytes() == b"old\n" * 100
    assert not bound_log(path, max_bytes=400)
