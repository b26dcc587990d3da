"""Processes that are named in a file: a pid alone may by now be somebody else's."""

from __future__ import annotations

import logging
import os
import select
import signal
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)


class ProcessIdentity(msgspec.Struct, frozen=True):
    pid: int
    start_ticks: int
    """When it started, in clock ticks since the host did: no two processes share pid and this."""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of a process that exists and has not ended; None: there is none."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in ("Z", "X") else cls(pid, int(fields[19]))

    @property
    def is_running(self) -> bool:
        return ProcessIdentity.of(self.pid) == self


def wait_ended(process: ProcessIdentity, timeout_s: float) -> bool:
    """Whether a process, which need not be our child, ends within ``timeout_s`` (or has before)."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return True
    try:
        # The descriptor is of whatever has the pid now; checked after opening it cannot change.
        return not process.is_running or bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


def stop_process(process: ProcessIdentity, *, timeout_s: float, what: str) -> None:
    """End a process that need not be our child: SIGTERM, and SIGKILL after ``timeout_s``.

    Returns when it has ended, at once if it had before. Raises ``PermissionError`` if it is not
    ours to end.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not process.is_running:
            return
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if select.select([pidfd], [], [], timeout_s)[0]:
            return
        log.warning("%s (pid %d) has not stopped in %g s: killed", what, process.pid, timeout_s)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], timeout_s)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
