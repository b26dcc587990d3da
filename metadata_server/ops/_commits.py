"""What a client's commit has to look like before anything of it is believed."""

from __future__ import annotations

from collections.abc import Sequence

from crailfs.errors import InvalidError, TooLargeError
from crailfs.limits import (
    COMMIT_EXTENTS_MAX,
    EXTENT_BLOCKS_MAX,
    FILE_SIZE_MAX_BYTES,
    REPLICAS_MAX,
)
from crailfs.records import Extent
from metadata_server import extents


def check_extents(new: Sequence[Extent], size: int, block_size_bytes: int) -> None:
    """Raise InvalidError unless the extents are whole, in order, apart, and within ``size`` bytes;
    TooLargeError if a file cannot be that long."""
    if not 0 <= size <= FILE_SIZE_MAX_BYTES:
        raise TooLargeError(f"{size} bytes: a file has at most {FILE_SIZE_MAX_BYTES}")
    if len(new) > COMMIT_EXTENTS_MAX:
        raise InvalidError(f"commit of {len(new)} extents: at most {COMMIT_EXTENTS_MAX}")
    next_block = 0
    for extent in new:
        fault = _fault(extent, next_block, size, block_size_bytes)
        if fault:
            raise InvalidError(
                f"extent at file block {extent.file_block}, {extent.block_count} blocks: {fault}"
            )
        next_block = extents.end_of(extent)


def _fault(extent: Extent, next_block: int, size: int, block_size_bytes: int) -> str:
    """What is wrong with the extent; empty: nothing."""
    if extent.file_block < next_block:
        return f"begins before block {next_block}, where the one before it ends"
    if not 1 <= extent.block_count <= EXTENT_BLOCKS_MAX:
        return f"not between 1 and {EXTENT_BLOCKS_MAX} blocks"
    if not 1 <= extent.tail_stored_bytes <= block_size_bytes:
        return f"{extent.tail_stored_bytes} bytes stored in a block of {block_size_bytes}"
    if not 0 <= extent.tail_visible_bytes <= extent.tail_stored_bytes:
        return f"shows {extent.tail_visible_bytes} of {extent.tail_stored_bytes} stored bytes"
    if extents.visible_end_bytes(extent, block_size_bytes) > size:
        return f"shows bytes beyond the file's {size}"
    if len(extent.checksums) != extents.CHECKSUM_BYTES * extent.block_count:
        return f"has {len(extent.checksums)} bytes of checksums"
    regions = {place.region for place in extent.replicas}
    if not 1 <= len(extent.replicas) <= REPLICAS_MAX or len(regions) != len(extent.replicas):
        return f"must have 1 to {REPLICAS_MAX} replicas, each in another region"
    return ""
