"""What a client knows of a file's committed extents."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

from crailfs.client.ranges import RangeSet
from crailfs.limits import EXTENT_BLOCKS_MAX
from crailfs.records import Extent, Location
from crailfs.units import blocks_for

CHECKSUM_BYTES: Final = 8
FILE_BLOCKS_END: Final = 1 << 63
"""Beyond every block that a file can have."""

HOLE: Final = Location(0, 0, 0)


def place_of(extent: Extent | None, file_block: int) -> Location:
    """Where the first replica of a block lies that ``extent`` holds; ``HOLE`` for ``None``."""
    if extent is None:
        return HOLE
    first = extent.replicas[0]
    return Location(first.region, first.block + file_block - extent.file_block, first.generation)


def cut(extent: Extent, first_block: int, end_block: int, block_size_bytes: int) -> Extent:
    """The part of ``extent`` that lies in the given file blocks, which it must touch."""
    extent_end = extent.file_block + extent.block_count
    first = max(first_block, extent.file_block)
    end = min(end_block, extent_end)
    if first == extent.file_block and end == extent_end:
        return extent
    skipped = first - extent.file_block
    has_tail = end == extent_end
    return Extent(
        file_block=first,
        block_count=end - first,
        tail_stored_bytes=extent.tail_stored_bytes if has_tail else block_size_bytes,
        tail_visible_bytes=extent.tail_visible_bytes if has_tail else block_size_bytes,
        replicas=tuple(
            Location(place.region, place.block + skipped, place.generation)
            for place in extent.replicas
        ),
        checksums=extent.checksums[
            skipped * CHECKSUM_BYTES : (end - extent.file_block) * CHECKSUM_BYTES
        ],
    )


def joined(
    extents: Sequence[Extent], first_block: int, end_block: int, block_size_bytes: int
) -> list[Extent]:
    """For reading the given blocks: ``extents``, which touch them, in file order, with those in one
    that follow each other in the file and in each replica. Its generations are those of its first
    part. At most as many of the blocks come together as one extent may have: what is read at once
    is held in memory, and registered with a device, at once."""
    found: list[Extent] = []
    parts: list[Extent] = []
    block_count = 0
    for extent in extents:
        begin, end = extent.file_block, extent.file_block + extent.block_count
        wanted = min(end, end_block) - max(begin, first_block)
        if parts and (
            block_count + wanted > EXTENT_BLOCKS_MAX
            or not _continues(parts[-1], extent, block_size_bytes)
        ):
            found.append(_join(parts))
            parts, block_count = [], 0
        parts.append(extent)
        block_count += wanted
    if parts:
        found.append(_join(parts))
    return found


def _continues(extent: Extent, behind: Extent, block_size_bytes: int) -> bool:
    return (
        extent.file_block + extent.block_count == behind.file_block
        and extent.tail_stored_bytes == extent.tail_visible_bytes == block_size_bytes
        and [(place.region, place.block + extent.block_count) for place in extent.replicas]
        == [(place.region, place.block) for place in behind.replicas]
    )


def _join(parts: Sequence[Extent]) -> Extent:
    if len(parts) == 1:
        return parts[0]
    return Extent(
        file_block=parts[0].file_block,
        block_count=sum(part.block_count for part in parts),
        tail_stored_bytes=parts[-1].tail_stored_bytes,
        tail_visible_bytes=parts[-1].tail_visible_bytes,
        replicas=parts[0].replicas,
        checksums=b"".join(part.checksums for part in parts),
    )


class BlockMap:
    """Extents of one file as of one ``data_version``, complete for the ``known`` blocks only."""

    __slots__ = ("_block_size_bytes", "_extents", "_known", "_starts")

    def __init__(self, block_size_bytes: int) -> None:
        self._block_size_bytes = block_size_bytes
        self._starts: list[int] = []
        self._extents: list[Extent] = []
        self._known = RangeSet()

    @classmethod
    def empty_file(cls, block_size_bytes: int) -> BlockMap:
        """Of a file that has no block at all: a hole from end to end."""
        blocks = cls(block_size_bytes)
        blocks._known.add(0, FILE_BLOCKS_END)
        return blocks

    @property
    def extent_count(self) -> int:
        return len(self._extents)

    def first_unknown(self, first_block: int, end_block: int) -> tuple[int, int] | None:
        return self._known.first_gap(first_block, end_block)

    def knows(self, first_block: int, end_block: int) -> bool:
        return self._known.covers(first_block, end_block)

    def at(self, file_block: int) -> Extent | None:
        """The extent that holds a known block; ``None``: a hole."""
        index = bisect_right(self._starts, file_block) - 1
        if index >= 0:
            extent = self._extents[index]
            if file_block < extent.file_block + extent.block_count:
                return extent
        return None

    def overlapping(self, first_block: int, end_block: int) -> list[Extent]:
        """Extents that touch the given blocks, in order, uncut."""
        low, high = self._touching(first_block, end_block)
        return self._extents[low:high]

    def learn(self, first_block: int, end_block: int, extents: Iterable[Extent]) -> None:
        """Take over what the metadata server said of these blocks."""
        self._clear(first_block, end_block)
        for extent in extents:
            self.put(extent)
        self._known.add(first_block, end_block)

    def put(self, extent: Extent) -> None:
        """Lay ``extent`` over whatever was at its blocks."""
        end_block = extent.file_block + extent.block_count
        self._clear(extent.file_block, end_block)
        index = bisect_right(self._starts, extent.file_block)
        self._starts.insert(index, extent.file_block)
        self._extents.insert(index, extent)
        self._known.add(extent.file_block, end_block)

    def truncate(self, size_bytes: int) -> None:
        """The metadata server has set the file's size to ``size_bytes``.

        An extent whose tail was hidden has a new generation, which only a fresh map tells.
        """
        end_block = blocks_for(size_bytes, self._block_size_bytes)
        self._clear(end_block, FILE_BLOCKS_END)
        self._known.add(end_block, FILE_BLOCKS_END)
        visible_bytes = size_bytes % self._block_size_bytes
        last = self.at(end_block - 1) if visible_bytes else None
        if last is not None and last.tail_visible_bytes > visible_bytes:
            self._clear(last.file_block, end_block)
            self._known.remove(last.file_block, end_block)

    def _touching(self, first_block: int, end_block: int) -> tuple[int, int]:
        low = bisect_right(self._starts, first_block) - 1
        if low < 0 or self._starts[low] + self._extents[low].block_count <= first_block:
            low += 1
        high = low
        while high < len(self._starts) and self._starts[high] < end_block:
            high += 1
        return low, high

    def _clear(self, first_block: int, end_block: int) -> None:
        low, high = self._touching(first_block, end_block)
        if low == high:
            return
        kept: list[Extent] = []
        first, last = self._extents[low], self._extents[high - 1]
        if first.file_block < first_block:
            kept.append(cut(first, 0, first_block, self._block_size_bytes))
        if last.file_block + last.block_count > end_block:
            kept.append(cut(last, end_block, FILE_BLOCKS_END, self._block_size_bytes))
        self._extents[low:high] = kept
        self._starts[low:high] = [extent.file_block for extent in kept]
