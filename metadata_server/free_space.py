"""The runs of free blocks of each region, and the sums over them: tables ``free`` and ``usage``.

Used by ``space.py``, which knows where the blocks come from and go to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from crailfs.errors import InternalError
from metadata_server import schema
from metadata_server.schema import Usage
from metadata_server.txn import Txn

CONTIGUOUS_SEARCH_RUNS = 1_024
"""How many free runs of a region are looked at for a long enough one; then any will do."""


class Span(NamedTuple):
    """Neighbouring blocks of one region."""

    region: int
    block: int
    block_count: int


def take(txn: Txn, region: int, wanted: int, contiguous_blocks: int, run_limit: int) -> list[Span]:
    """Up to ``wanted`` blocks off the region's free runs, low addresses first."""
    long_enough = min(contiguous_blocks, wanted)
    chosen: list[Span] = []
    spare: list[Span] = []
    start, end = schema.free_key(region, 0), schema.free_key(region + 1, 0)
    missing = wanted
    for searched, (key, value) in enumerate(txn.scan(schema.FREE, start, end)):
        if not missing or len(chosen) >= run_limit:
            break
        span = Span(region, schema.unpack_region_block(key)[1], schema.unpack_u64(value))
        if span.block_count >= long_enough or searched >= CONTIGUOUS_SEARCH_RUNS:
            chosen.append(span)
            missing -= min(missing, span.block_count)
        else:
            spare.append(span)
    for span in spare:
        if not missing or len(chosen) >= run_limit:
            break
        chosen.append(span)
        missing -= min(missing, span.block_count)

    taken: list[Span] = []
    for span in chosen:
        block_count = min(span.block_count, wanted)
        wanted -= block_count
        # Put before delete, here and below: LMDB drops a page whenever a table becomes empty, and
        # reuses it only two checkpoints later.
        if block_count < span.block_count:
            _put_free(txn, region, span.block + block_count, span.block_count - block_count)
        txn.delete(schema.FREE, schema.free_key(region, span.block))
        taken.append(Span(region, span.block, block_count))
    count(
        txn,
        region,
        free=-sum(span.block_count for span in taken),
        high_water_blocks=max(span.block + span.block_count for span in taken),
    )
    return taken


def take_exactly(txn: Txn, span: Span) -> bool:
    """Take these blocks off the free runs; False, and nothing is taken, if one of them is not
    free."""
    region, block, block_count = span
    row = txn.last_before(schema.FREE, schema.free_key(region, block + 1))
    if row is None:
        return False
    found_region, first = schema.unpack_region_block(row[0])
    end = first + schema.unpack_u64(row[1])
    if found_region != region or block + block_count > end:
        return False
    if block + block_count < end:
        _put_free(txn, region, block + block_count, end - block - block_count)
    if first < block:
        _put_free(txn, region, first, block - first)
    else:
        txn.delete(schema.FREE, row[0])
    count(txn, region, free=-block_count)
    return True


def runs(txn: Txn, region: int) -> list[Span]:
    """All free runs of the region, in order."""
    start, end = schema.free_key(region, 0), schema.free_key(region + 1, 0)
    return [
        Span(region, schema.unpack_region_block(key)[1], schema.unpack_u64(value))
        for key, value in txn.scan(schema.FREE, start, end)
    ]


def retire(txn: Txn, region: int, block: int) -> bool:
    """Take a failed block out of circulation; False if it is not free (then it is kept by whoever
    has it, and can be retired when that one lets go of it)."""
    return take_exactly(txn, Span(region, block, 1))


def usage(txn: Txn, region_key: bytes) -> Usage:
    """The sums of the region with that key in ``regions``."""
    value = txn.get(schema.USAGE, region_key)
    return Usage() if value is None else schema.decode_usage(value)


def coalesced(spans: Iterable[Span]) -> list[Span]:
    """The same blocks in as few spans as can be, in order."""
    joined: list[Span] = []
    for span in sorted(spans):
        last = joined[-1] if joined else None
        if last and last.region == span.region and last.block + last.block_count == span.block:
            joined[-1] = Span(last.region, last.block, last.block_count + span.block_count)
        else:
            joined.append(span)
    return joined


def give(txn: Txn, spans: Iterable[Span]) -> None:
    """The blocks become free; runs that touch become one."""
    for region, first, added in coalesced(spans):
        block, block_count = first, added
        before = txn.last_before(schema.FREE, schema.free_key(region, first))
        if before is not None:
            other_region, other_block = schema.unpack_region_block(before[0])
            other_end = other_block + schema.unpack_u64(before[1])
            if other_region == region and other_end > first:
                raise InternalError(f"block {first} of region {region} was freed twice")
            if other_region == region and other_end == first:
                block, block_count = other_block, first - other_block + added
        behind_key = schema.free_key(region, first + added)
        behind = txn.get(schema.FREE, behind_key)
        if behind is not None:
            block_count += schema.unpack_u64(behind)
        _put_free(txn, region, block, block_count)
        if behind is not None:
            txn.delete(schema.FREE, behind_key)
        count(txn, region, free=added)


def _put_free(txn: Txn, region: int, block: int, block_count: int) -> None:
    txn.put(schema.FREE, schema.free_key(region, block), schema.ino_value(block_count))


def count(
    txn: Txn,
    region: int,
    *,
    free: int = 0,
    reclaim: int = 0,
    clearing: int = 0,
    high_water_blocks: int = 0,
) -> None:
    """Add to the region's sums; ``high_water_blocks`` only ever rises."""
    key = schema.region_key(region)
    known = usage(txn, key)
    changed = Usage(
        known.free_blocks + free,
        known.reclaim_blocks + reclaim,
        max(known.high_water_blocks, high_water_blocks),
        known.clearing_blocks + clearing,
    )
    txn.put(schema.USAGE, key, schema.encode(changed))
