"""A region of the same host with direct I/O: the client reads and writes the device itself, through
a ring of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import trio

from crailfs.device_io import DirectFile
from crailfs.errors import DamagedError, UnavailableError
from crailfs.net.sending import Buffer
from crailfs.wire.messages import AttachedRegion


class DirectRegion:
    """See ``LocalRegion``. A read is a view of memory that the device filled. Small writes cost as
    much as a block: whoever writes collects whole ones."""

    in_place = False

    def __init__(self, description: AttachedRegion, fd: int, life_line_fd: int) -> None:
        """``life_line_fd``: stays open, with its lock, until no request is under way any more."""
        self.size_bytes = description.block_count * description.block_size_bytes
        self._data_offset = description.data_offset
        self._id = description.region_id
        self._fd = fd
        # The ring is made at the first use, when the caller may have put a new one in its place.
        self._life_line_fd = os.dup(life_line_fd)
        self._file = DirectFile(fd, life_line_fd=self._life_line_fd)
        self._closing = False

    async def read(self, offset: int, byte_count: int) -> Buffer:
        with self._device_errors("reading", offset, byte_count):
            return await self._file.read_view(self._data_offset + offset, byte_count)

    async def write(self, offset: int, data: Buffer) -> None:
        with self._device_errors("writing", offset, len(data)):
            await self._file.write(self._data_offset + offset, memoryview(data))

    async def flush(self) -> bool:
        with self._device_errors("flushing", 0, self.size_bytes):
            await self._file.sync()
        return True

    async def close(self) -> None:
        """Waits for what is under way: afterwards nothing can change a block any more. What has not
        begun by then fails with ``UnavailableError``."""
        self._closing = True
        with trio.CancelScope(shield=True):
            await self._file.drain()
        self._file.close()
        os.close(self._fd)
        os.close(self._life_line_fd)

    @contextlib.contextmanager
    def _device_errors(self, action: str, offset: int, byte_count: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._closing:
                raise UnavailableError(
                    f"{action} {byte_count} bytes at {offset} of region {self._id}: it was closed"
                ) from error
            raise DamagedError(
                f"{action} {byte_count} bytes at {offset} of region {self._id}: {error.strerror}; "
                "check the device under it"
            ) from error
