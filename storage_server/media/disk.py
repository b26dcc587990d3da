"""A region on disk: a preallocated file, read and written through the page cache.

The page cache is what makes short-lived data cheap here: what is deleted before the kernel wrote
it back never costs a disk access. ``flush`` is ``fdatasync``.
"""

from __future__ import annotations

import os

from crailfs.config import RegionConfig
from crailfs.transports.file_io import InlineWrites, read_exactly, write_all
from storage_server.media.region_file import RegionFile, open_region_file
from storage_server.media.superblock import DATA_OFFSET_BYTES, Superblock


class DiskMedium:
    """See ``Medium``. Durable after ``flush``."""

    durable = True
    mappable = False

    def __init__(self, file: RegionFile) -> None:
        self._file = file
        self.path = file.path
        self.superblock = file.superblock
        self.shared_fd = file.shared_fd
        self.blocks: memoryview | None = None
        self._inline_writes = InlineWrites()
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

    def read_into(self, offset: int, buffer: memoryview, *, wait: bool) -> bool:
        return read_exactly(self._file.fd, buffer, DATA_OFFSET_BYTES + offset, wait=wait)

    def write_inline(self, offset: int, data: memoryview) -> bool:
        if not self._inline_writes.allowed(len(data)):
            return False
        self._inline_writes.write_all(self._file.fd, data, DATA_OFFSET_BYTES + offset)
        return True

    def write(self, offset: int, data: memoryview) -> None:
        write_all(self._file.fd, data, DATA_OFFSET_BYTES + offset)

    def flush(self) -> bool:
        os.fdatasync(self._file.fd)
        return True

    def provision(self, wanted_blocks: int) -> bool:
        return False

    def close(self) -> None:
        self._file.close()


def _allocate(fd: int, superblock: Superblock) -> None:
    os.posix_fallocate(fd, 0, superblock.file_size_bytes)
