"""One region as the server holds it: its medium, its bounds, and who may still write where."""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Sequence
from typing import Final

import trio

from crailfs.errors import FencedError, InvalidError, NotSupportedError
from crailfs.limits import HEADER_PAGE_MAX, PAYLOAD_MAX_BYTES
from crailfs.records import HeaderChange, RegionInfo
from crailfs.units import GIB
from crailfs.wire.messages import AttachedRegion, HeaderPage, RegionState
from storage_server.media import Medium
from storage_server.media.headers import HeaderStore

PROVISION_MARGIN_BYTES: Final = 1 * GIB
"""How far memory is provisioned beyond the highest block that was ever handed out: what a writer of
2 GB/s takes between two heartbeats."""
FAILED_REPORTED_MAX: Final = 1_024
"""In one heartbeat; of more, each names the next ones."""
_MAP_NORESERVE: Final = 0x4000


class Region:
    """``region_id`` is 0 until the metadata server has given it one."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.region_id = 0
        self.failed_blocks: set[int] = set()
        self._last_reported = -1
        self.high_water_blocks = 0
        self._high_water_changed = trio.Event()
        self._headers_turn = trio.Lock()
        superblock = medium.superblock
        self._block_size_bytes = superblock.block_size_bytes
        # 8 bytes a block, of which the kernel supplies only the pages that were ever stored to.
        self._generations = memoryview(
            mmap.mmap(
                -1,
                8 * superblock.block_count,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
            )
        ).cast("Q")

    @property
    def info(self) -> RegionInfo:
        superblock = self.medium.superblock
        return RegionInfo(
            uuid=superblock.region_uuid,
            tier=superblock.tier,
            block_size_bytes=superblock.block_size_bytes,
            block_count=superblock.block_count,
            durable=self.medium.durable,
            label=str(self.medium.path),
            medium=self.medium.kind,
            keeps_headers=self.headers is not None,
            held_blocks=0 if self.headers is None else self.headers.held_blocks,
            header_sequence=self.header_sequence,
        )

    @property
    def attached(self) -> AttachedRegion:
        superblock, layout = self.medium.superblock, self.medium.layout
        return AttachedRegion(
            region_id=self.region_id,
            tier=superblock.tier,
            block_size_bytes=superblock.block_size_bytes,
            block_count=superblock.block_count,
            data_offset=layout.data_offset,
            access=layout.access,
            flush_method=layout.flush_method,
            durable=self.medium.durable,
            segment_bytes=layout.segment_bytes,
            segment_offsets=layout.segment_offsets,
            map_sync=layout.map_sync,
        )

    def next_state(self) -> RegionState:
        """What the next heartbeat says."""
        return RegionState(
            region_id=self.region_id,
            usable_blocks=self.medium.usable_blocks,
            failed_blocks=self._next_failed_blocks(),
        )

    def _next_failed_blocks(self) -> tuple[int, ...]:
        """In turns, again and again: one that a file has is retired only when it comes free."""
        failed = sorted(self.failed_blocks)
        if len(failed) > FAILED_REPORTED_MAX:
            begin = bisect.bisect_right(failed, self._last_reported)
            failed = (failed[begin:] + failed[:begin])[:FAILED_REPORTED_MAX]
            self._last_reported = failed[-1]
        return tuple(failed)

    def check_range(self, offset: int, byte_count: int) -> None:
        """Raises ``InvalidError`` unless these bytes lie in blocks that can have been granted."""
        if not 1 <= byte_count <= PAYLOAD_MAX_BYTES:
            raise InvalidError(
                f"{byte_count} bytes in one request; expected 1 to {PAYLOAD_MAX_BYTES}"
            )
        self.check_inside(offset, byte_count)

    def check_inside(self, offset: int, byte_count: int) -> None:
        """``check_range`` for bytes that are not the request's payload."""
        usable_bytes = self.medium.usable_blocks * self._block_size_bytes
        if byte_count < 1 or not 0 <= offset <= usable_bytes - byte_count:
            raise InvalidError(
                f"bytes {offset} to {offset + byte_count} are not in region {self.region_id}, "
                f"which has {usable_bytes} usable ones"
            )

    def claim(self, offset: int, byte_count: int, generation: int) -> None:
        """Let ``generation`` write these bytes, and nothing older from now on.

        Raises ``FencedError`` if one of the blocks has been written under a newer generation.
        """
        if not 1 <= generation < 1 << 64:
            raise InvalidError(f"generation {generation}: expected 1 to 2^64 - 1")
        blocks = self.blocks(offset, byte_count)
        for block in blocks:
            if self._generations[block] > generation:
                raise FencedError(
                    f"block {block} of region {self.region_id} was granted again as generation "
                    f"{self._generations[block]}; a write under {generation} comes too late"
                )
        for block in blocks:
            self._generations[block] = generation

    def blocks(self, offset: int, byte_count: int) -> range:
        """The blocks that these bytes touch."""
        size = self._block_size_bytes
        return range(offset // size, (offset + byte_count - 1) // size + 1)

    @property
    def wanted_blocks(self) -> int:
        """How far the medium should be provisioned."""
        return self.high_water_blocks + PROVISION_MARGIN_BYTES // self._block_size_bytes

    def raise_high_water(self, block_count: int) -> None:
        """Blocks up to here have been handed out."""
        if block_count > self.high_water_blocks:
            self.high_water_blocks = block_count
            self._high_water_changed.set()
            self._high_water_changed = trio.Event()

    async def high_water_raised(self) -> None:
        """Wait until ``raise_high_water`` raises it."""
        await self._high_water_changed.wait()

    # --- headers --------------------------------------------------------------------------------

    @property
    def headers(self) -> HeaderStore | None:
        return self.medium.headers

    @property
    def header_sequence(self) -> int:
        """Of the last change that is durable in the headers; 0 also if there are none."""
        return 0 if self.headers is None else self.headers.applied_sequence

    def has_blocks(self, first_block: int, block_count: int) -> bool:
        """Whether it has these blocks, at least one."""
        end = first_block + block_count
        return 0 <= first_block < end <= self.medium.superblock.block_count

    async def apply_headers(self, changes: Sequence[HeaderChange], last_sequence: int) -> None:
        """As ``HeaderStore.apply``."""
        async with self._headers_turn:
            assert self.headers is not None
            # A thread that is abandoned by a cancellation would write to a region that is closed.
            await trio.to_thread.run_sync(self.headers.apply, changes, last_sequence)

    async def read_headers(self, first_block: int, header_limit: int) -> HeaderPage:
        """As ``HeaderStore.read``. Raises ``NotSupportedError`` if the region keeps none."""
        if self.headers is None:
            raise NotSupportedError(f"region {self.region_id} keeps no block headers")
        if not 1 <= header_limit <= HEADER_PAGE_MAX:
            raise InvalidError(f"{header_limit} headers at once: 1 to {HEADER_PAGE_MAX} can be had")
        if first_block > self.medium.superblock.block_count:
            raise InvalidError(f"region {self.region_id} has no block {first_block}")
        async with self._headers_turn:
            found, next_block = await trio.to_thread.run_sync(
                self.headers.read, first_block, header_limit
            )
        return HeaderPage(tuple(found), next_block)
