"""Changes of what files own in regions that keep headers, until they are durable there: the table
``header_log``.

Used by ``space.py``, which knows where the blocks come from and go to. A change without an owner
holds its blocks: they are free when it goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import merge
from typing import NamedTuple

from msgspec.structs import replace

from crailfs.limits import HEADER_CHANGE_BLOCKS_MAX
from crailfs.records import Extent, HeaderChange
from metadata_server import free_space, schema
from metadata_server.free_space import Span
from metadata_server.txn import Txn

SEQUENCE_MAX = (1 << 64) - 1


class Page(NamedTuple):
    """Some changes in the order of their sequences."""

    changes: tuple[HeaderChange, ...]
    last_sequence: int
    complete: bool
    """Whether there are no more below the end that was asked for."""


def publish(txn: Txn, ino: int, extent: Extent, regions: frozenset[int]) -> None:
    """The blocks are the file's, as the extent describes them; noted where a replica lies in
    ``regions``, those that keep headers."""
    _append(
        txn,
        [
            HeaderChange(
                place.region,
                place.block,
                extent.block_count,
                ino,
                extent.file_block,
                0,  # see ``page``
                extent.tail_stored_bytes,
                extent.tail_visible_bytes,
                extent.checksums,
            )
            for place in extent.replicas
            if place.region in regions
        ],
    )


def clear(txn: Txn, spans: Iterable[Span]) -> None:
    """The blocks, which lie in regions that keep headers, are nobody's: they wait here."""
    changes = []
    for region, block, block_count in free_space.coalesced(spans):
        free_space.count(txn, region, clearing=block_count)
        end = block + block_count
        changes += [
            HeaderChange(region, first, min(HEADER_CHANGE_BLOCKS_MAX, end - first), 0)
            for first in range(block, end, HEADER_CHANGE_BLOCKS_MAX)
        ]
    _append(txn, changes)


def page(txn: Txn, regions: Iterable[int], *, after: int, end_sequence: int, limit: int) -> Page:
    """The first ``limit`` changes of these regions with ``after`` < sequence < ``end_sequence``;
    fewer if they are of very many blocks, each of which the region has work with."""
    rows = merge(
        *(
            txn.scan(
                schema.HEADER_LOG,
                schema.header_change_key(region, min(after + 1, SEQUENCE_MAX)),
                schema.header_change_key(region, end_sequence),
            )
            for region in regions
        ),
        key=lambda row: _sequence(row[0]),
    )
    changes: list[HeaderChange] = []
    last_sequence, block_count = after, 0
    for key, value in rows:
        change = schema.decode_header_change(value)
        block_count += change.block_count
        if len(changes) == limit or (changes and block_count > HEADER_CHANGE_BLOCKS_MAX):
            return Page(tuple(changes), last_sequence, False)
        last_sequence = _sequence(key)
        # Not that of the grant: a client may commit under an older grant what replaces what another
        # one has committed under a newer one, and a salvage has to know which came last.
        changes.append(replace(change, generation=last_sequence if change.ino else 0))
    return Page(tuple(changes), last_sequence, True)


def acknowledge(txn: Txn, regions: Iterable[int], through: int) -> list[Span]:
    """Every change of these regions with a sequence up to ``through`` is durable there: forget
    them. Returns the blocks that waited for that."""
    cleared = []
    for region in regions:
        rows = list(
            txn.scan(
                schema.HEADER_LOG,
                schema.header_change_key(region, 0),
                schema.header_change_key(region, min(through + 1, SEQUENCE_MAX)),
            )
        )
        for key, value in rows:
            txn.delete(schema.HEADER_LOG, key)
            change = schema.decode_header_change(value)
            if not change.ino:
                free_space.count(txn, region, clearing=-change.block_count)
                cleared.append(Span(region, change.block, change.block_count))
    return cleared


def begin_above(txn: Txn, sequence: int) -> None:
    """A region has applied changes up to this one, perhaps those of a name space that is lost: no
    change of this one may have such a number."""
    if sequence >= txn.state(b"next_header_change"):
        txn.set_state(b"next_header_change", sequence + 1)


def _append(txn: Txn, changes: list[HeaderChange]) -> None:
    if not changes:
        return
    first = txn.next_counter(b"next_header_change", len(changes))
    for sequence, change in enumerate(changes, first):
        key = schema.header_change_key(change.region, sequence)
        txn.put(schema.HEADER_LOG, key, schema.encode(change))


def _sequence(key: bytes) -> int:
    return schema.unpack_region_block(key)[1]
