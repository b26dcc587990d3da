"""A region on disk: a preallocated file, read and written through the page cache.

The page cache is what makes short-lived data cheap here: what is deleted before the kernel wrote
it back never costs a disk access. ``flush`` is ``fdatasync``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from crailfs.config import RegionConfig
from crailfs.device_io.file_io import InlineWrites, read_exactly, write_all
from crailfs.wire.messages import Access, FlushMethod
from storage_server.media.layout import Layout
from storage_server.media.region_file import RegionFile, open_region_file
from storage_server.media.superblock import DATA_OFFSET_BYTES, Superblock

THREADS_MAX: Final = 8


class DiskMedium:
    """See ``Medium``. Durable after ``flush``."""

    durable = True
    kind = "file"
    layout = Layout(DATA_OFFSET_BYTES, Access.FILE, FlushMethod.FILE)
    headers = None

    def __init__(self, file: RegionFile) -> None:
        self._file = file
        self.path = file.path
        self.superblock = file.superblock
        self.shared_fd = file.shared_fd
        self.blocks: memoryview | None = None
        self._inline_writes = InlineWrites()
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self.usable_blocks = file.superblock.block_count

    @classmethod
    def open(
        cls, config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int,
        known_uuid: bytes | None,
    ) -> DiskMedium:  # fmt: skip
        return cls(
            open_region_file(
                config,
                cluster_id=cluster_id,
                block_size_bytes=block_size_bytes,
                known_uuid=known_uuid,
                survives_reboot=True,
                allocate=_allocate,
            )
        )

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return read_exactly(self._file.fd, buffer, DATA_OFFSET_BYTES + offset, wait=False)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._in_thread(
            partial(read_exactly, self._file.fd, buffer, DATA_OFFSET_BYTES + offset, wait=True)
        )

    def try_write(self, offset: int, data: memoryview) -> bool:
        position = DATA_OFFSET_BYTES + offset
        if self._inline_writes.allowed(len(data)):
            self._inline_writes.write_all(self._file.fd, data, position)
            return True
        if self._threads.available_tokens:
            return False
        # All threads are taken: writing here makes everybody wait, the sender too.
        write_all(self._file.fd, data, position)
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        await self._in_thread(partial(write_all, self._file.fd, data, DATA_OFFSET_BYTES + offset))

    def persist(self, offset: int, byte_count: int) -> None:
        """Nothing is mapped."""

    async def flush(self) -> bool:
        await self._in_thread(partial(os.fdatasync, self._file.fd))
        return True

    async def discard(self, first_block: int, block_count: int) -> None:
        """The file keeps its room."""

    async def _in_thread(self, work: Callable[[], object]) -> None:
        await trio.to_thread.run_sync(work, limiter=self._threads)

    def provision(self, wanted_blocks: int) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


def _allocate(fd: int, superblock: Superblock) -> None:
    os.posix_fallocate(fd, 0, superblock.file_size_bytes)
