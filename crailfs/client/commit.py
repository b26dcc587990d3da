"""From pending blocks to the extents of a commit."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from crailfs.client.file_state import PendingBlock
from crailfs.limits import BODY_MAX_BYTES, COMMIT_EXTENTS_MAX, EXTENT_BLOCKS_MAX
from crailfs.records import Extent, Location
from crailfs.wire.messages import BaseBlock

BATCH_EXTENTS_MAX: Final = min(COMMIT_EXTENTS_MAX, 2_048)
_EXTENT_BYTES: Final = 96
"""At most what an extent takes in a message, besides its checksums."""
_BASE_BYTES: Final = 32
_BATCH_BYTES: Final = BODY_MAX_BYTES // 2


class Batch(NamedTuple):
    """Extents that fit into one commit, with the file blocks that they are made of."""

    extents: tuple[Extent, ...]
    bases: tuple[BaseBlock, ...]
    file_blocks: list[int]


def first_batch(pending: Mapping[int, PendingBlock], block_size_bytes: int) -> Batch:
    """The first of ``pending`` in file order, as many as fit. Each must have its checksum."""
    items = sorted(pending.items())
    extents: list[Extent] = []
    bases: list[BaseBlock] = []
    file_blocks: list[int] = []
    message_bytes = 0
    at = 0
    while at < len(items) and len(extents) < BATCH_EXTENTS_MAX and message_bytes < _BATCH_BYTES:
        file_block, first = items[at]
        count = 1
        last = first
        while (
            at + count < len(items)
            and count < EXTENT_BLOCKS_MAX
            and last.stored_bytes == block_size_bytes
        ):
            next_file_block, block = items[at + count]
            if (
                next_file_block != file_block + count
                or block.block != first.block + count
                or block.region != first.region
                or block.generation != first.generation
            ):
                break
            last = block
            count += 1
        members = items[at : at + count]
        extents.append(
            Extent(
                file_block,
                count,
                last.stored_bytes,
                last.stored_bytes,
                (Location(first.region, first.block, first.generation),),
                struct.pack(f"<{count}Q", *(block.checksum for _, block in members)),
            )
        )
        for member, block in members:
            file_blocks.append(member)
            if block.dirty is not None:
                base = block.base
                bases.append(BaseBlock(member, base.generation, base.region, base.block))
                message_bytes += _BASE_BYTES
        message_bytes += _EXTENT_BYTES + 8 * count
        at += count
    return Batch(tuple(extents), tuple(bases), file_blocks)
