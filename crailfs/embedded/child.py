"""One process of an embedded file system, as its supervisor sees it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from crailfs.embedded.logs import open_log
from crailfs.embedded.process_identity import ProcessIdentity
from crailfs.embedded.state import RunningProcess

log = logging.getLogger(__name__)

RESTART_DELAY_MIN_S: Final = 0.1
RESTART_DELAY_MAX_S: Final = 10.0
STEADY_S: Final = 30.0
"""Running this long, its next restart is prompt again."""
_READY_LINE_MAX_BYTES: Final = 65_536


class ChildSpec(NamedTuple):
    name: str
    command: tuple[str, ...]
    """``--ready-fd N`` is added; see ``crailfs.cli.serving`` for what is written there."""
    stop_timeout_s: float
    """From SIGTERM to SIGKILL."""
    before_start: Callable[[], object] | None = None
    """Called before each start; an error in it counts as a failed start."""
    ends_all: bool = False
    """Ending by itself with 0 is meant: everything else is stopped too."""


class Child:
    """Starts the process, reads its ready notice, knows when to start it again."""

    def __init__(self, spec: ChildSpec, log_file: Path, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self.log_file = log_file
        self.ready: tuple[str, ...] = ()
        self.restart_count = 0
        self.restart_at = 0.0
        """On the monotonic clock, while it is not running."""
        self.pidfd = -1
        self.ready_fd = -1
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._notice = b""
        self._started_at = 0.0
        self._delay_s = RESTART_DELAY_MIN_S

    @property
    def is_running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Raises ``OSError`` or what ``before_start`` raises."""
        assert self._process is None
        self._started_at = time.monotonic()
        if self.spec.before_start is not None:
            self.spec.before_start()
        reading, writing = os.pipe()
        try:
            output = open_log(self.log_file)
            try:
                self._process = subprocess.Popen(
                    [*self.spec.command, "--ready-fd", str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(writing,),
                    env=self._environment,
                )
            finally:
                os.close(output)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        os.set_blocking(reading, False)
        self.ready_fd = reading
        self.pidfd = os.pidfd_open(self._process.pid)
        self._notice = b""
        log.info("started %s, pid %d", self.spec.name, self._process.pid)

    def read_notice(self) -> dict[str, Any] | None:
        """Call when ``ready_fd`` is readable: the whole notice, or None if there is none (yet)."""
        piece = os.read(self.ready_fd, _READY_LINE_MAX_BYTES)
        self._notice += piece
        if piece and b"\n" not in self._notice and len(self._notice) < _READY_LINE_MAX_BYTES:
            return None
        self._close_ready_fd()
        try:
            notice = json.loads(self._notice)
        except ValueError:
            return None  # it ended, or speaks nonsense: its exit tells
        if not isinstance(notice, dict):
            return None
        if "ready" in notice:
            self.ready = tuple(str(where) for where in notice["ready"])
        return notice

    def collect_exit(self) -> int | None:
        """The exit status (negative: a signal) if it has ended; plans the next start."""
        assert self._process is not None
        status = self._process.poll()
        if status is None:
            return None
        self._process = None
        self.ready = ()
        os.close(self.pidfd)
        self.pidfd = -1
        self._close_ready_fd()
        return status

    def plan_restart(self) -> float:
        """Seconds until the next start: longer each time that it fails soon after one."""
        if time.monotonic() - self._started_at >= STEADY_S:
            self._delay_s = RESTART_DELAY_MIN_S
        delay_s = self._delay_s
        self._delay_s = min(2 * self._delay_s, RESTART_DELAY_MAX_S)
        self.restart_at = time.monotonic() + delay_s
        self.restart_count += 1
        return delay_s

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when its time is up; returns when it has ended."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(self.spec.stop_timeout_s)
        except subprocess.TimeoutExpired:
            log.warning(
                "%s (pid %d) has not stopped in %g s: killed",
                self.spec.name,
                self.pid,
                self.spec.stop_timeout_s,
            )
            self._process.kill()
            self._process.wait()
        status = self.collect_exit()
        log.info("%s stopped, status %s", self.spec.name, status)

    def describe(self) -> RunningProcess:
        identity = ProcessIdentity.of(self._process.pid) if self._process is not None else None
        return RunningProcess(identity, self.ready, self.restart_count)

    def _close_ready_fd(self) -> None:
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1
