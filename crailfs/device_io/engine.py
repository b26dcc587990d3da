"""What moves bytes between aligned memory and a device, and which one this host can use."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Final, Protocol

from crailfs.device_io.threads import Threads

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Everything goes on to its end when it is cancelled: afterwards the kernel knows nothing of
    the memory any more. Raises ``OSError``, for each request its own."""

    async def read(self, fd: int, position: int, buffer: memoryview) -> None:
        """Fill ``buffer``."""

    async def write(self, fd: int, position: int, data: memoryview) -> None:
        """Write all of ``data``."""

    async def sync(self, fd: int) -> None:
        """fdatasync."""

    async def drain(self) -> None:
        """Wait until nothing is under way."""

    def close(self) -> None:
        """Waits for what the kernel has under way; what threads have must have been drained."""


_WHEEL_INSTRUCTIONS: Final = frozenset({"avx512f", "avx512vl"})
"""liburing 2026.3.30 is compiled for these: without them the first call is a SIGILL."""


def _lacking_instructions() -> frozenset[str]:
    """Those of the wheel's that this processor does not have."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return _WHEEL_INSTRUCTIONS - frozenset(found[1].split() if found else ())


@functools.cache
def engine_name() -> str:
    """``io_uring`` or ``threads``: what this process uses. Logs once why not the first."""
    try:
        if lacking := _lacking_instructions():
            raise ImportError(f"its wheel is compiled for {', '.join(sorted(lacking))}")
        from crailfs.device_io.ring import probe

        probe()
    except ImportError as error:
        log.warning("direct I/O uses threads: there is no liburing here (%s)", error)
    except OSError as error:
        log.warning("direct I/O uses threads: the kernel allows no io_uring (%s)", error.strerror)
    else:
        return "io_uring"
    return "threads"


def open_engine(life_line_fd: int = -1) -> Engine:
    """``life_line_fd``: a descriptor whose file stays open, with its locks, until the last request
    has ended even if the process is killed meanwhile. -1: none."""
    if engine_name() == "threads":
        return Threads()
    from crailfs.device_io.ring import Ring

    return Ring(life_line_fd)
