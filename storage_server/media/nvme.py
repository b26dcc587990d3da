"""A region on an NVMe disk, or any other fast one: a whole block device or a preallocated file,
read and written directly, many requests at a time.

    superblock | block headers | blocks

The page cache is left out: it would be a second copy of what clients cache already, and it lets
through one request at a time. Writes begin at multiples of ``ALIGNMENT_BYTES``, and zeros follow
their last byte up to the next: a block is its writer's alone, who sends it from its beginning.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import trio

from crailfs.config import RegionConfig
from crailfs.device_io import DirectFile, check_position, engine_name, open_direct
from crailfs.errors import ConfigurationError
from crailfs.wire.messages import Access, FlushMethod
from storage_server.media.layout import Layout
from storage_server.media.nvme_device import can_discard, discard, open_device
from storage_server.media.nvme_headers import HeaderTable
from storage_server.media.pmem_place import in_memory
from storage_server.media.region_file import RegionFile, open_region_file
from storage_server.media.superblock import DATA_OFFSET_BYTES, Superblock

log = logging.getLogger(__name__)


class NvmeMedium:
    """See ``Medium``. Durable after ``flush``."""

    durable = True

    def __init__(self, file: RegionFile) -> None:
        self._file = file
        self.path = file.path
        self.superblock = file.superblock
        self._data_offset = file.superblock.data_offset_bytes
        self.layout = Layout(self._data_offset, Access.DIRECT, FlushMethod.FILE)
        self.blocks: memoryview | None = None
        self.usable_blocks = file.superblock.block_count
        is_device = stat.S_ISBLK(os.fstat(file.fd).st_mode)
        self._can_discard = is_device and can_discard(file.fd)
        self.kind = "block device" if is_device else "file"
        self.kind += " with direct I/O" + ("" if engine_name() == "io_uring" else " in threads")
        self._fd = open_direct(file.fd)
        # An open of the clients' own: what one of them does to its flags concerns no request of
        # ours.
        self.shared_fd = file.shared_fd
        fcntl.fcntl(self.shared_fd, fcntl.F_SETFL, os.O_DIRECT)
        self._direct = DirectFile(self._fd)
        self.headers = HeaderTable(self._fd, file.path, file.superblock, DATA_OFFSET_BYTES)

    @classmethod
    def open(
        cls, config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int,
        known_uuid: bytes | None,
    ) -> NvmeMedium:  # fmt: skip
        path = config.path
        if path.is_block_device():
            file = open_device(
                config,
                cluster_id=cluster_id,
                block_size_bytes=block_size_bytes,
                known_uuid=known_uuid,
            )
        else:
            _check_direct_io(path)
            file = open_region_file(
                config,
                cluster_id=cluster_id,
                block_size_bytes=block_size_bytes,
                known_uuid=known_uuid,
                survives_reboot=True,
                allocate=_allocate,
            )
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return False

    def read(self, offset: int, buffer: memoryview) -> Coroutine[Any, Any, None]:
        return self._direct.read(self._data_offset + offset, buffer)

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Raises ``InvalidError`` unless ``offset`` is a multiple of ``ALIGNMENT_BYTES``."""
        check_position(offset)
        return False

    def write(self, offset: int, data: memoryview) -> Coroutine[Any, Any, None]:
        """Raises as ``try_write`` does."""
        return self._direct.write(self._data_offset + offset, data)

    def persist(self, offset: int, byte_count: int) -> None:
        """Nothing is mapped."""

    async def flush(self) -> bool:
        await self._direct.sync()
        return True

    async def discard(self, first_block: int, block_count: int) -> None:
        if not self._can_discard:
            return
        size = self.superblock.block_size_bytes
        position = self._data_offset + first_block * size
        try:
            await trio.to_thread.run_sync(partial(discard, self._fd, position, block_count * size))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            log.info("region %s: the device takes no discards", self.path)
            self._can_discard = False

    def provision(self, wanted_blocks: int) -> bool:
        return False

    def close(self) -> None:
        self._direct.close()
        os.close(self._fd)
        self._file.close()


def _allocate(fd: int, superblock: Superblock) -> None:
    os.posix_fallocate(fd, 0, superblock.file_size_bytes)


def _check_direct_io(path: Path) -> None:
    """Raises ``ConfigurationError`` if a file at ``path`` would not be on a device, or if its file
    system does nothing past the page cache."""
    try:
        directory_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # making or opening the file says why
    try:
        works = not in_memory(directory_fd)
        if works:
            os.close(os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        # Others: no right to write there, or no unnamed files; the file itself will tell.
        works = error.errno != errno.EINVAL
    finally:
        os.close(directory_fd)
    if not works:
        raise ConfigurationError(
            f"region {path}: tier nvme needs direct I/O, which the file system there does not have "
            "(tmpfs never does). Use a block device or a file on ext4 or xfs, or tier disk"
        )
