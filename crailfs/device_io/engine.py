"""What moves bytes between aligned memory and a device, and which one this host can use."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

from crailfs.device_io.ring import Ring
from crailfs.device_io.threads import Threads
from crailfs.device_io.uring import Uring

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Everything goes on to its end when it is cancelled: afterwards the kernel knows nothing of
    the memory any more. Raises ``OSError``, for each request its own."""

    async def move(
        self, fd: int, position: int, buffer: memoryview, address: int, *, writing: bool
    ) -> None:
        """Write all of ``buffer``, or fill it. ``address`` is where its memory begins."""

    async def sync(self, fd: int) -> None:
        """fdatasync."""

    async def drain(self) -> None:
        """Wait until nothing is under way."""

    def close(self) -> None:
        """Waits for what the kernel has under way; what threads have must have been drained."""


@functools.cache
def engine_name() -> str:
    """``io_uring`` or ``threads``: what this process uses. Logs once why not the first."""
    try:
        Uring(1).close()
    except OSError as error:
        log.warning("direct I/O uses threads: there is no io_uring here (%s)", error.strerror)
        return "threads"
    return "io_uring"


def open_engine(life_line_fd: int = -1) -> Engine:
    """``life_line_fd``: a descriptor whose file stays open, with its locks, until the last request
    has ended even if the process is killed meanwhile. -1: none."""
    return Threads() if engine_name() == "threads" else Ring(life_line_fd)
