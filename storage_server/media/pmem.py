"""A region in persistent memory: a libpmemobj pool on a DAX device, in a file on a DAX file system,
or, to stand in, in any other file.

This server and the clients of its host map the blocks. With DAX, and on tmpfs to exercise and
measure the same instructions, bytes are made durable by writing the processor's caches back; in any
other file by msync. A block's bytes are durable before the header that publishes them.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from crailfs.config import RegionConfig
from crailfs.pmem import libpmem
from crailfs.pmem.mapping import SegmentMapping
from crailfs.units import MIB
from crailfs.wire.messages import Access, FlushMethod
from storage_server.media.layout import Layout
from storage_server.media.pmem_headers import PmemHeaders
from storage_server.media.pmem_place import Kind
from storage_server.media.pmem_pool import PmemRegion, open_pmem_region

TOUCH_STEP_BYTES: Final = 32 * MIB
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; older kernels answer EINVAL and the first writer touches the pages."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PmemMedium:
    """See ``Medium``. All blocks are usable at once: the file has all its room. Where bytes need no
    device to become durable, ``provision`` touches the pages ahead of the first writer."""

    def __init__(self, region: PmemRegion) -> None:
        self._region = region
        superblock, directory, kind = region.superblock, region.directory, region.place.kind
        self.path = region.path
        self.superblock = superblock
        self.kind = kind.value
        self.durable = kind.durable
        self.numa_node = region.place.numa_node
        """-1: none is known."""
        self.layout = Layout(
            directory.data_offsets[0],
            Access.MAP,
            kind.flush_method,
            directory.segment_bytes,
            directory.data_offsets,
            map_sync=kind is Kind.FSDAX,
        )
        self.shared_fd = region.shared_fd
        self._mapping = SegmentMapping(
            region.shared_fd,
            directory.data_offsets,
            directory.segment_bytes,
            superblock.data_size_bytes,
            synchronous=self.layout.map_sync,
        )
        self._data = self._mapping.view
        self.blocks: memoryview | None = self._data
        self.usable_blocks = superblock.block_count
        self._touched_blocks = 0
        self._by_cache_lines = self.layout.flush_method is FlushMethod.CACHE_LINES
        self.headers = PmemHeaders(
            region.path,
            region.pool,
            superblock,
            region.root,
            directory,
            # Not a method of ours: in a circle, the mapping would outlive its last use.
            partial(_make_durable, self._mapping, self._by_cache_lines),
        )

    @classmethod
    def open(
        cls, config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int,
        known_uuid: bytes | None,
    ) -> PmemMedium:  # fmt: skip
        region = open_pmem_region(
            config,
            cluster_id=cluster_id,
            block_size_bytes=block_size_bytes,
            known_uuid=known_uuid,
        )
        try:
            return cls(region)
        except BaseException:
            region.close()
            raise

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = self._data[offset : offset + len(buffer)]
        return True

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.try_read(offset, buffer)

    def try_write(self, offset: int, data: memoryview) -> bool:
        self._data[offset : offset + len(data)] = data
        self.persist(offset, len(data))
        return True

    async def write(self, offset: int, data: memoryview) -> None:
        self.try_write(offset, data)

    def persist(self, offset: int, byte_count: int) -> None:
        if self._by_cache_lines:
            libpmem.persist(self._mapping.address + offset, byte_count)

    async def flush(self) -> bool:
        """With DAX every write was made durable by itself, or by ``persist``."""
        if not self._by_cache_lines:
            mapping = self._mapping
            await trio.to_thread.run_sync(
                partial(libpmem.msync, mapping.address, len(mapping.view))
            )
        return self.durable

    async def discard(self, first_block: int, block_count: int) -> None:
        """The region keeps its room."""

    def provision(self, wanted_blocks: int) -> bool:
        wanted_blocks = min(wanted_blocks, self.superblock.block_count)
        if not self._by_cache_lines or self._touched_blocks >= wanted_blocks:
            return False
        step_blocks = max(1, TOUCH_STEP_BYTES // self.superblock.block_size_bytes)
        self._touch(min(wanted_blocks, self._touched_blocks + step_blocks))
        return True

    def close(self) -> None:
        self.headers.close()
        os.close(self._region.shared_fd)
        os.close(self._region.fd)

    def _touch(self, end_block: int) -> None:
        size = self.superblock.block_size_bytes
        begin, end = self._touched_blocks * size, end_block * size
        if _libc.madvise(self._mapping.address + begin, end - begin, _MADV_POPULATE_WRITE) != 0:
            problem = ctypes.get_errno()
            if problem != errno.EINVAL:
                raise OSError(problem, os.strerror(problem), str(self.path))
        self._touched_blocks = end_block


def _make_durable(
    mapping: SegmentMapping, by_cache_lines: bool, ranges: Sequence[tuple[int, int]]
) -> None:
    if by_cache_lines:
        for offset, byte_count in ranges:
            libpmem.flush(mapping.address + offset, byte_count)
        libpmem.drain()
    else:
        for offset, byte_count in ranges:
            libpmem.msync(mapping.address + offset, byte_count)
