"""A region in memory: a file on tmpfs, mapped by this server and by the clients of its host.

A store to a page that tmpfs cannot supply is SIGBUS. So no block is offered before its pages are
reserved (``fallocate``: 0.1 ms/MiB). Afterwards each reserved page is touched once through our own
mapping: the kernel, and on a virtual machine the host, finds and clears it only then (up to
1 ms/MiB), and this takes that cost off the first writer. How far the reservation has come is kept
in the file itself, so that a restarted server knows it at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

from crailfs.config import RegionConfig
from crailfs.errors import NoSpaceError
from crailfs.units import KIB, MIB, format_bytes
from crailfs.wire.messages import Access
from storage_server.media.layout import Layout
from storage_server.media.region_file import RegionFile, open_region_file
from storage_server.media.superblock import DATA_OFFSET_BYTES, Superblock

PROVISION_STEP_BYTES: Final = 32 * MIB
HOST_MEMORY_FLOOR_BYTES: Final = 256 * MIB
"""Reservation stops while the host has less than this available: tmpfs itself would go on until
the kernel kills processes."""

_PROGRESS_OFFSET_BYTES: Final = 16 * KIB
_PROGRESS: Final = struct.Struct(">QQ")
"""The number of reserved blocks, and its complement as a check."""
_U64_MASK: Final = (1 << 64) - 1
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; older kernels answer EINVAL and the first writer touches the pages."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MemoryMedium:
    """See ``Medium``. Never durable: the bytes outlive every process, not the host."""

    durable = False
    kind = "tmpfs"
    layout = Layout(DATA_OFFSET_BYTES, Access.MAP)
    headers = None

    def __init__(self, file: RegionFile) -> None:
        self._file = file
        self.path = file.path
        self.superblock = file.superblock
        self.shared_fd = file.shared_fd
        # mmap keeps a duplicate of its descriptor: one that holds the lock would hold it on.
        self._mapping = mmap.mmap(file.shared_fd, file.superblock.file_size_bytes)
        self._data = memoryview(self._mapping)[DATA_OFFSET_BYTES:]
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.blocks: memoryview | None = self._data
        self.usable_blocks = self._read_progress()
        self._touched_blocks = self.usable_blocks

    @classmethod
    def open(
        cls, config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int,
        known_uuid: bytes | None,
    ) -> MemoryMedium:  # fmt: skip
        return cls(
            open_region_file(
                config,
                cluster_id=cluster_id,
                block_size_bytes=block_size_bytes,
                known_uuid=known_uuid,
                survives_reboot=False,
                allocate=_allocate,
            )
        )

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = self._data[offset : offset + len(buffer)]
        return True

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.try_read(offset, buffer)

    def try_write(self, offset: int, data: memoryview) -> bool:
        self._data[offset : offset + len(data)] = data
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        self.try_write(offset, data)

    def persist(self, offset: int, byte_count: int) -> None:
        """Nothing makes memory durable."""

    async def flush(self) -> bool:
        return False

    async def discard(self, first_block: int, block_count: int) -> None:
        """The pages stay reserved."""

    def provision(self, wanted_blocks: int) -> bool:
        wanted_blocks = min(wanted_blocks, self.superblock.block_count)
        if self.usable_blocks < wanted_blocks:
            self._reserve(min(wanted_blocks, self.usable_blocks + self._step_blocks))
        elif self._touched_blocks < self.usable_blocks:
            self._touch(min(self.usable_blocks, self._touched_blocks + self._step_blocks))
        else:
            return False
        return True

    def close(self) -> None:
        self._file.close()

    @property
    def _step_blocks(self) -> int:
        return max(1, PROVISION_STEP_BYTES // self.superblock.block_size_bytes)

    def _reserve(self, end_block: int) -> None:
        begin, end = self._byte_range(self.usable_blocks, end_block)
        available_bytes = host_memory_available_bytes()
        if available_bytes < end - begin + HOST_MEMORY_FLOOR_BYTES:
            raise NoSpaceError(
                f"region {self.path} stays at {format_bytes(begin)} for now: the host has "
                f"{format_bytes(available_bytes)} of memory available"
            )
        try:
            os.posix_fallocate(self._file.fd, begin, end - begin)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise
            raise NoSpaceError(
                f"region {self.path} stays at {format_bytes(begin)} for now: {error.strerror}"
            ) from error
        progress = _PROGRESS.pack(end_block, end_block ^ _U64_MASK)
        os.pwrite(self._file.fd, progress, _PROGRESS_OFFSET_BYTES)
        self.usable_blocks = end_block

    def _touch(self, end_block: int) -> None:
        begin, end = self._byte_range(self._touched_blocks, end_block)
        # Through ctypes because mmap.madvise() would hold the interpreter's lock for up to 32 ms.
        begin -= begin % mmap.PAGESIZE
        if _libc.madvise(self._address + begin, end - begin, _MADV_POPULATE_WRITE) != 0:
            problem = ctypes.get_errno()
            if problem != errno.EINVAL:
                raise OSError(problem, os.strerror(problem), str(self.path))
        self._touched_blocks = end_block

    def _byte_range(self, first_block: int, end_block: int) -> tuple[int, int]:
        size = self.superblock.block_size_bytes
        return DATA_OFFSET_BYTES + first_block * size, DATA_OFFSET_BYTES + end_block * size

    def _read_progress(self) -> int:
        """0 if the note is unreadable: reserving again what is reserved changes nothing."""
        count, complement = _PROGRESS.unpack(
            os.pread(self._file.fd, _PROGRESS.size, _PROGRESS_OFFSET_BYTES)
        )
        valid = count == complement ^ _U64_MASK and count <= self.superblock.block_count
        return int(count) if valid else 0


def _allocate(fd: int, superblock: Superblock) -> None:
    os.ftruncate(fd, superblock.file_size_bytes)
    os.posix_fallocate(fd, 0, DATA_OFFSET_BYTES)


def host_memory_available_bytes() -> int:
    """What the kernel could still give to programs without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * KIB
    raise OSError(errno.ENODATA, "/proc/meminfo has no line MemAvailable")
