"""One file or block device, read and written directly, past the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine
from typing import Any, Final

from crailfs.device_io.buffers import ALIGNMENT_BYTES, AlignedBuffers, address_of, round_up
from crailfs.device_io.engine import Engine, open_engine
from crailfs.errors import InvalidError

_ZEROS: Final = bytes(ALIGNMENT_BYTES)


class DirectFile:
    """``fd`` is open with O_DIRECT and stays the caller's. Positions are bytes in the file.

    All of it goes on to its end when it is cancelled. Raises ``OSError`` for what the device does
    not do. The first call decides which event loop it belongs to.
    """

    def __init__(self, fd: int, *, life_line_fd: int = -1) -> None:
        """``life_line_fd``: see ``open_engine``."""
        self._fd = fd
        self._life_line_fd = life_line_fd
        self._buffers = AlignedBuffers()
        self._opened: Engine | None = None
        self._closed = False

    # Not coroutines themselves: each frame that a request passes through costs 0.2 us.

    def read(self, position: int, buffer: memoryview) -> Coroutine[Any, Any, None]:
        """Fill ``buffer``; without a copy if it and ``position`` are aligned."""
        if not (position | len(buffer)) % ALIGNMENT_BYTES and not buffer.readonly:
            address = address_of(buffer)
            if not address % ALIGNMENT_BYTES:
                return self._engine.move(self._fd, position, buffer, address, writing=False)
        return self._read_copying(position, buffer)

    async def read_view(self, position: int, byte_count: int) -> memoryview:
        """``byte_count`` bytes in memory that is used again when the last view of it is gone."""
        before_bytes = position % ALIGNMENT_BYTES
        view = self._buffers.take(round_up(before_bytes + byte_count))
        begin = position - before_bytes
        await self._engine.move(self._fd, begin, view, address_of(view), writing=False)
        return view[before_bytes : before_bytes + byte_count]

    def write(self, position: int, data: memoryview) -> Coroutine[Any, Any, None]:
        """What follows ``data`` up to the next multiple of ``ALIGNMENT_BYTES`` becomes zeros.

        Without a copy if ``data`` is aligned. Raises ``InvalidError`` as ``check_position`` does.
        """
        check_position(position)
        if not len(data) % ALIGNMENT_BYTES and not data.readonly:
            address = address_of(data)
            if not address % ALIGNMENT_BYTES:
                return self._engine.move(self._fd, position, data, address, writing=True)
        byte_count = len(data)
        copy = self._buffers.take(round_up(byte_count))
        copy[:byte_count] = data
        copy[byte_count:] = _ZEROS[: len(copy) - byte_count]
        return self._engine.move(self._fd, position, copy, address_of(copy), writing=True)

    async def _read_copying(self, position: int, buffer: memoryview) -> None:
        buffer[:] = await self.read_view(position, len(buffer))

    async def sync(self) -> None:
        """fdatasync: what was written outlives a power cut."""
        await self._engine.sync(self._fd)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        if self._opened is not None:
            await self._opened.drain()

    def close(self) -> None:
        """Nothing may be under way in a thread. Waits for what is under way in a ring: afterwards
        nothing arrives any more. ``fd`` stays open."""
        self._closed = True
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            if self._closed:
                raise OSError(errno.EBADF, "the file is closed")
            self._opened = open_engine(self._life_line_fd)
        return self._opened


def check_position(position: int) -> None:
    """Raises ``InvalidError`` unless a write may begin there."""
    if position % ALIGNMENT_BYTES:
        raise InvalidError(
            f"a write at byte {position} of a region with direct I/O: it must begin at a multiple "
            f"of {ALIGNMENT_BYTES}"
        )


def open_direct(fd: int) -> int:
    """Another descriptor of ``fd``'s file, with O_DIRECT and without its locks.

    Raises ``OSError`` (EINVAL) if the file system cannot do direct I/O.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
