"""A region of the same host that clients read and write through the page cache: disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial

import trio

from crailfs.device_io.file_io import InlineWrites, read_exactly, write_all
from crailfs.errors import DamagedError
from crailfs.net.sending import Buffer
from crailfs.wire.messages import AttachedRegion


class FileRegion:
    """See ``LocalRegion``. Through the page cache."""

    in_place = True

    def __init__(self, description: AttachedRegion, fd: int) -> None:
        self.size_bytes = description.block_count * description.block_size_bytes
        self._data_offset = description.data_offset
        self._id = description.region_id
        self._fd = fd
        self._inline_writes = InlineWrites()
        self._thread_count = 0
        self._threads_ended = trio.lowlevel.ParkingLot()

    async def read(self, offset: int, byte_count: int) -> Buffer:
        buffer = bytearray(byte_count)
        read = partial(read_exactly, self._fd, memoryview(buffer), self._data_offset + offset)
        with self._device_errors("reading", offset, byte_count):
            if not read(wait=False):
                await self._in_thread(partial(read, wait=True))
        return buffer

    async def write(self, offset: int, data: Buffer) -> None:
        view, position = memoryview(data), self._data_offset + offset
        with self._device_errors("writing", offset, len(data)):
            if self._inline_writes.allowed(len(data)):
                self._inline_writes.write_all(self._fd, view, position)
            else:
                await self._in_thread(partial(write_all, self._fd, view, position))

    async def flush(self) -> bool:
        with self._device_errors("flushing", 0, self.size_bytes):
            await self._in_thread(partial(os.fdatasync, self._fd))
        return True

    async def close(self) -> None:
        """Waits for what threads are writing: afterwards nothing can change a block any more."""
        while self._thread_count:
            with trio.CancelScope(shield=True):
                await self._threads_ended.park()
        os.close(self._fd)

    async def _in_thread(self, work: Callable[[], object]) -> None:
        self._thread_count += 1
        try:
            await trio.to_thread.run_sync(work)
        finally:
            self._thread_count -= 1
            self._threads_ended.unpark_all()

    @contextlib.contextmanager
    def _device_errors(self, action: str, offset: int, byte_count: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DamagedError(
                f"{action} {byte_count} bytes at {offset} of region {self._id}: {error.strerror}; "
                "check the device under it"
            ) from error
