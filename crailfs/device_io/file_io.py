"""Reads and writes at a position of a region's file, and when they may be done in the event loop.

Measured (2-core virtual machine): ``pwrite`` into the page cache 100 us/MiB, ``preadv`` from it 100
us/MiB, the trip to a worker thread and back 100 us. So what does not wait for a device is done in
place up to 1 MiB. For reads the kernel tells (``RWF_NOWAIT``). For writes it does not, on ext4: the
sign of a device that falls behind is a write that took long, and from then on threads are used for
a while, so that a writer who is being held back holds back nobody else.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from crailfs.units import MIB

INLINE_WRITE_MAX_BYTES: Final = 1 * MIB
SLOW_WRITE_S: Final = 0.01
"""Longer than a busy host keeps a process from its processor now and then."""
THREADS_AFTER_SLOW_WRITE_S: Final = 0.25

_WOULD_BLOCK: Final = (errno.EAGAIN, errno.EOPNOTSUPP)
"""The bytes are not in the page cache; or the file system cannot tell."""


def read_exactly(fd: int, buffer: memoryview, position: int, *, wait: bool) -> bool:
    """Fill ``buffer``; without ``wait``, False if a device would have to be waited for.

    Raises ``OSError``, also if the file ends before the buffer is full.
    """
    flags = 0 if wait else os.RWF_NOWAIT
    while buffer:
        try:
            count = os.preadv(fd, [buffer], position, flags)
        except OSError as error:
            if not wait and error.errno in _WOULD_BLOCK:
                return False
            raise
        if count == 0:
            raise OSError(errno.EIO, "the region's file ends early")
        buffer = buffer[count:]
        position += count
    return True


def write_all(fd: int, data: memoryview, position: int) -> None:
    """Write all of ``data``. Raises ``OSError``."""
    while data:
        count = os.pwrite(fd, data, position)
        data = data[count:]
        position += count


class InlineWrites:
    """Decides for one file whether to write in place, by how long the last such write took."""

    def __init__(self) -> None:
        self._threads_until_s = 0.0

    def allowed(self, byte_count: int) -> bool:
        """Whether to write ``byte_count`` bytes in the event loop."""
        return byte_count <= INLINE_WRITE_MAX_BYTES and time.monotonic() >= self._threads_until_s

    def write_all(self, fd: int, data: memoryview, position: int) -> None:
        """``write_all``, timed. Only in the event loop."""
        begin_s = time.monotonic()
        write_all(fd, data, position)
        end_s = time.monotonic()
        if end_s - begin_s > SLOW_WRITE_S:
            self._threads_until_s = end_s + THREADS_AFTER_SLOW_WRITE_S
