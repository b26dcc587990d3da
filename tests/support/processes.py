"""Real processes for tests: started with a log of their own, waited for with a deadline, always
ended by their own pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CRAIL = (sys.executable, "-m", "crailfs.cli.main")
READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def die_with_the_test() -> None:
    """In a server: a test run that is killed, or ends at a time limit, leaves none behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ServerProcess:
    """One server started as its users start it: ``crail metadata``, ``storage`` or ``mount``.

    ``addresses`` is what the process reported when it was ready: where it is bound, or mounted.
    Leaving the ``with`` block ends the process.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        self.log = log
        read_fd, write_fd = os.pipe()
        try:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    [*CRAIL, *arguments, "--ready-fd", str(write_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(write_fd,),
                    env=dict(environment) if environment is not None else None,
                    preexec_fn=die_with_the_test,  # noqa: PLW1509 - one system call, no locks
                )
        finally:
            os.close(write_fd)
        try:
            self.addresses: list[str] = self._wait_ready(read_fd, ready_timeout_s)
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(read_fd)

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Ask for a clean stop (SIGTERM); the exit status. A process that stays is killed and is
        a failure of the test."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"pid {self.pid} did not stop within {timeout_s} s of SIGTERM:\n{self.log_text()}"
            ) from None

    def kill(self) -> None:
        """End it as a crash would: SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.stop()
        else:
            self.kill()

    def _wait_ready(self, read_fd: int, timeout_s: float) -> list[str]:
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([read_fd], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(read_fd, 65536) if readable else b""
            if not piece:
                why = "ended" if readable else f"was not ready within {timeout_s} s"
                raise AssertionError(f"pid {self.pid} {why}:\n{self.log_text()}")
            line += piece
        report: dict[str, Any] = json.loads(line)
        if "error" in report:
            raise AssertionError(f"pid {self.pid} failed to start: {report['error']}")
        return list(report["ready"])


def run_crail(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
    user: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; its output is captured as text."""
    return subprocess.run(
        [*CRAIL, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=dict(environment) if environment is not None else None,
        user=user,
        check=False,
    )


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Look again and again (every 10 ms) until ``condition`` holds; fail with ``what`` after the
    deadline. For states of other processes that nothing announces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextlib.contextmanager
def killed_at_end(pids: Callable[[], Sequence[int]]) -> Iterator[None]:
    """Whatever happens in the block: the processes that ``pids`` names then are killed."""
    try:
        yield
    finally:
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
