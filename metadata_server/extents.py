"""The map from a file's blocks to extents: finding, cutting and joining them. Moves no blocks."""

from __future__ import annotations

import itertools

from crailfs.limits import EXTENT_BLOCKS_MAX
from crailfs.records import Extent, Location
from metadata_server import schema
from metadata_server.txn import Txn

CHECKSUM_BYTES = 8
FILE_BLOCK_END = (1 << 64) - 1
"""Greater than the index of every block that a file can have."""


def end_of(extent: Extent) -> int:
    """One past the extent's last file block."""
    return extent.file_block + extent.block_count


def visible_end_bytes(extent: Extent, block_size_bytes: int) -> int:
    """The file offset behind the last byte that a reader sees of the extent."""
    return (end_of(extent) - 1) * block_size_bytes + extent.tail_visible_bytes


def overlapping(
    txn: Txn, ino: int, first_block: int, end_block: int, limit: int | None = None
) -> list[Extent]:
    """The node's extents that touch file blocks ``first_block`` <= b < ``end_block``, in order;
    only the first ``limit`` of them, or a few more, if that is given."""
    start = schema.extent_key(ino, first_block)
    found = []
    before = txn.last_before(schema.EXTENTS, start)
    if before is not None and before[0][:8] == start[:8]:
        extent = schema.decode_extent(before[1])
        if end_of(extent) > first_block:
            found.append(extent)
    end = schema.extent_key(ino, end_block)
    rows = itertools.islice(txn.scan(schema.EXTENTS, start, end), limit)
    return found + [schema.decode_extent(value) for _, value in rows]


HOLE = Location(0, 0, 0)


def place_at(txn: Txn, ino: int, file_block: int) -> Location:
    """Where the block that the file shows there lies; ``HOLE`` if there is none."""
    for extent in overlapping(txn, ino, file_block, file_block + 1):
        first = extent.replicas[0]
        return Location(
            first.region, first.block + file_block - extent.file_block, first.generation
        )
    return HOLE


def put(txn: Txn, ino: int, extent: Extent) -> None:
    txn.put(schema.EXTENTS, schema.extent_key(ino, extent.file_block), schema.encode(extent))


def delete(txn: Txn, ino: int, extent: Extent) -> None:
    txn.delete(schema.EXTENTS, schema.extent_key(ino, extent.file_block))


def cut(extent: Extent, first_block: int, end_block: int, block_size_bytes: int) -> Extent:
    """The part of the extent in file blocks ``first_block`` <= b < ``end_block`` (inside it)."""
    skipped = first_block - extent.file_block
    block_count = end_block - first_block
    keeps_tail = end_block == end_of(extent)
    return Extent(
        first_block,
        block_count,
        extent.tail_stored_bytes if keeps_tail else block_size_bytes,
        extent.tail_visible_bytes if keeps_tail else block_size_bytes,
        tuple(
            Location(place.region, place.block + skipped, place.generation)
            for place in extent.replicas
        ),
        extent.checksums[CHECKSUM_BYTES * skipped : CHECKSUM_BYTES * (skipped + block_count)],
    )


def join(left: Extent, right: Extent, block_size_bytes: int) -> Extent | None:
    """Both as one extent; None unless they are neighbours in file and media and fit in one."""
    block_count = left.block_count + right.block_count
    if (
        end_of(left) != right.file_block
        or block_count > EXTENT_BLOCKS_MAX
        or left.tail_visible_bytes != block_size_bytes
        or left.tail_stored_bytes != block_size_bytes
        or len(left.replicas) != len(right.replicas)
    ):
        return None
    for ours, theirs in zip(left.replicas, right.replicas, strict=True):
        if (
            ours.region != theirs.region
            or ours.block + left.block_count != theirs.block
            or ours.generation != theirs.generation
        ):
            return None
    return Extent(
        left.file_block,
        block_count,
        right.tail_stored_bytes,
        right.tail_visible_bytes,
        left.replicas,
        left.checksums + right.checksums,
    )


def put_joined(txn: Txn, ino: int, extent: Extent, block_size_bytes: int) -> None:
    """Add the extent to the node's, as one with its neighbours where they continue each other."""
    end = end_of(extent)
    behind_value = txn.get(schema.EXTENTS, schema.extent_key(ino, end))
    if behind_value is not None:
        behind = schema.decode_extent(behind_value)
        joined = join(extent, behind, block_size_bytes)
        if joined is not None:
            delete(txn, ino, behind)
            extent = joined
    if extent.file_block:
        for before in overlapping(txn, ino, extent.file_block - 1, extent.file_block):
            extent = join(before, extent, block_size_bytes) or extent
    put(txn, ino, extent)
