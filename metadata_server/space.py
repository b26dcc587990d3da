"""Blocks and who has them: free, granted, owned by a file, awaiting reclaim, awaiting that their
header says that they are nobody's.

The only module that moves a block from one of these to another. All of its state is in the tables
``free``, ``grants``, ``extents``, ``reclaim``, ``header_log`` and ``usage``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from crailfs.errors import FencedError, InvalidError, NoSpaceError, TryAgainError
from crailfs.limits import GRANT_BLOCKS_MAX, GRANT_RUNS_MAX, REGION_BLOCKS_MAX
from crailfs.records import Extent, Location, Run, StorageClass, StorageServerInfo, Tier
from crailfs.units import blocks_for
from crailfs.wire.messages import TierStatistics
from metadata_server import extents, free_space, header_log, schema
from metadata_server.context import Context
from metadata_server.free_space import Span
from metadata_server.schema import Granted, StoredRegion, Usage
from metadata_server.txn import Txn

REGION_ID_END = 1 << 32
CLIENT_ID_MAX = (1 << 64) - 1

NOBODY = 0
"""In ``reclaim``: no client can write there any more, only read what it cached."""


# --- granting -----------------------------------------------------------------------------------


def grant(
    txn: Txn,
    context: Context,
    *,
    storage_class: StorageClass,
    location: str,
    host: str,
    block_count: int,
    contiguous_blocks: int,
) -> tuple[Run, ...]:
    """Hand free blocks to the asking client under a new generation.

    At most ``block_count`` blocks, at least one, all of the fastest tier in ``storage_class`` that
    has any. ``location`` names the host or rack that is preferred, else ``host`` is, else its
    rack, else the region with most free. Runs are at least ``contiguous_blocks`` long where there
    are such.

    NoSpaceError: every tier of the class is full. TryAgainError: it is, but blocks will come free
    by themselves, or the servers that have them are away.
    """
    if not 1 <= block_count <= GRANT_BLOCKS_MAX or contiguous_blocks < 1:
        raise InvalidError(
            f"grant of {block_count} blocks in runs of {contiguous_blocks}: "
            f"both must be between 1 and {GRANT_BLOCKS_MAX}"
        )
    known = _regions(txn)
    regions = [r for r in known if storage_class.first <= r.stored.info.tier <= storage_class.last]
    available = [r for r in regions if r.grantable and r.usage.free_blocks]
    if not available:
        raise _out_of_space(txn, context, storage_class, regions)
    tier = min(r.stored.info.tier for r in available)
    racks = {r.server.rack for r in known if r.server.host == host and r.server.rack}
    candidates = sorted(
        (r for r in available if r.stored.info.tier == tier),
        key=lambda r: (_distance(r.server, location, host, racks), -r.usage.free_blocks),
    )
    generation = txn.next_counter(b"next_generation")
    runs: list[Run] = []
    missing = block_count
    for region in candidates:
        runs_left = GRANT_RUNS_MAX - len(runs)
        if not missing or not runs_left:
            break
        for span in free_space.take(txn, region.id, missing, contiguous_blocks, runs_left):
            txn.put(
                schema.GRANTS,
                schema.grant_key(context.client_id, span.region, span.block),
                schema.encode(Granted(span.block_count, generation, context.client_id)),
            )
            runs.append(Run(span.region, span.block, span.block_count, generation))
            missing -= span.block_count
    return tuple(runs)


class _Region(NamedTuple):
    id: int
    stored: StoredRegion
    server: StorageServerInfo
    usage: Usage

    @property
    def grantable(self) -> bool:
        return self.server.alive and not self.stored.lost and not self.stored.unclaimed

    def grows(self, now_ns: int) -> bool:
        """Whether more of its blocks can be expected to become usable."""
        stored = self.stored
        is_stalled = stored.full_since_ns and now_ns - stored.full_since_ns >= schema.STALLED_NS
        return stored.usable_blocks < stored.info.block_count and not is_stalled


def _regions(txn: Txn) -> list[_Region]:
    servers = {key: schema.decode_server(value).info for key, value in txn.scan(schema.SERVERS)}
    found = []
    for key, value in txn.scan(schema.REGIONS):
        stored = schema.decode_region(value)
        server = servers[stored.server_id]
        found.append(_Region(schema.unpack_region(key), stored, server, free_space.usage(txn, key)))
    return found


def _distance(server: StorageServerInfo, location: str, host: str, racks: set[str]) -> int:
    if location and location in (server.host, server.rack):
        return 0
    if server.host == host:
        return 1
    return 2 if server.rack in racks else 3


def _out_of_space(
    txn: Txn, context: Context, storage_class: StorageClass, regions: list[_Region]
) -> NoSpaceError | TryAgainError:
    live = {r.id for r in regions if r.grantable}
    unclaimed = [r.id for r in regions if r.stored.unclaimed and not r.stored.lost]
    if unclaimed and not live:
        return NoSpaceError(
            f"all that there is of class {storage_class} holds blocks of a lost name space (region "
            f"{unclaimed[0]}): run 'crail fsck --salvage'"
        )
    if regions and not live:
        return TryAgainError(
            f"no storage server with space of class {storage_class} is connected: "
            f"see 'crail status'"
        )
    for key, value in txn.scan(schema.RECLAIM):
        _, region, _ = schema.unpack_owner_region_block(key)
        if region in live and schema.decode_granted(value).client == NOBODY:
            return TryAgainError(f"blocks of class {storage_class} are being reclaimed")
    if any(r.grantable and r.usage.clearing_blocks for r in regions):
        return TryAgainError(
            f"blocks of class {storage_class} come free: they wait until the journal is synced and "
            "their headers, if they have such, are being cleared"
        )
    if any(r.grantable and r.grows(context.now_ns) for r in regions):
        return TryAgainError(f"memory of class {storage_class} is being provisioned")
    return NoSpaceError(
        f"every tier of storage class {storage_class} is full: delete files or add regions"
    )


def give_back(txn: Txn, context: Context, runs: Iterable[Run]) -> None:
    """Granted blocks that the client did not use become free.

    FencedError: one of them is not granted to this client under that generation.
    """
    returned = []
    for run in runs:
        span = Span(run.region, run.block, run.block_count)
        _take_granted(txn, context.client_id, span, run.generation)
        returned.append(span)
    free_space.give(txn, returned)


def _take_granted(txn: Txn, client_id: int, span: Span, generation: int) -> None:
    """Take the blocks off the client's grants; FencedError if they are not in them."""
    row = None
    if 0 <= span.region < REGION_ID_END and 0 <= span.block < REGION_BLOCKS_MAX:
        beyond = schema.grant_key(client_id, span.region, span.block + 1)
        row = txn.last_before(schema.GRANTS, beyond)
    if row is not None and span.block_count >= 1:
        key, value = row
        owner, region, block = schema.unpack_owner_region_block(key)
        granted = schema.decode_granted(value)
        before = span.block - block
        behind = granted.block_count - before - span.block_count
        if (
            owner == client_id
            and region == span.region
            and behind >= 0
            and granted.generation == generation
        ):
            # First what is put: see free_space.take.
            if behind:
                right = Granted(behind, generation, client_id)
                right_key = schema.grant_key(client_id, region, span.block + span.block_count)
                txn.put(schema.GRANTS, right_key, schema.encode(right))
            if before:
                left = Granted(before, generation, client_id)
                txn.put(schema.GRANTS, key, schema.encode(left))
            else:
                txn.delete(schema.GRANTS, key)
            return
    raise FencedError(
        f"blocks {span.block}+{span.block_count} of region {span.region} are not granted to client "
        f"{client_id:016x} under generation {generation}: what was written there is lost"
    )


# --- what a file owns ---------------------------------------------------------------------------


def release_extents(txn: Txn, context: Context, ino: int, from_block: int) -> int:
    """Take all file blocks from ``from_block`` on off the node; returns how many media blocks.

    They become free, or wait in ``reclaim`` while other clients hold a lease on the node. The
    caller accounts for them in the node's ``block_count``.
    """
    return _clear(txn, context, ino, from_block, extents.FILE_BLOCK_END)


def truncate_extents(txn: Txn, context: Context, ino: int, size_bytes: int) -> int:
    """As ``release_extents`` for all that lies wholly beyond ``size_bytes``, and hide the bytes
    beyond it in the block that it cuts.

    That block's extent gets a new generation: whoever is building on the longer one meets a
    ConflictError, and does not bring the hidden bytes back.
    """
    block_size_bytes = context.block_size_bytes
    released = release_extents(txn, context, ino, blocks_for(size_bytes, block_size_bytes))
    visible_bytes = size_bytes % block_size_bytes
    if not visible_bytes:
        return released
    last_block = size_bytes // block_size_bytes
    for extent in extents.overlapping(txn, ino, last_block, last_block + 1):
        if extent.tail_visible_bytes > visible_bytes:
            generation = txn.next_counter(b"next_generation")
            places = tuple(
                Location(place.region, place.block, generation) for place in extent.replicas
            )
            cut = msgspec.structs.replace(extent, tail_visible_bytes=visible_bytes, replicas=places)
            extents.put(txn, ino, cut)
            header_log.publish(txn, ino, cut, context.header_regions)
    return released


def take_extents(txn: Txn, context: Context, ino: int, new: Iterable[Extent]) -> int:
    """Make granted blocks the node's, in place of what it had there; returns by how much its
    ``block_count`` grows (negative: shrinks).

    The extents are well formed. FencedError: a block is not granted to this client under that
    generation.
    """
    block_size_bytes = context.block_size_bytes
    growth = 0
    for extent in new:
        for place in extent.replicas:
            span = Span(place.region, place.block, extent.block_count)
            _take_granted(txn, context.client_id, span, place.generation)
        if context.header_regions:
            # Before what it replaces is cleared: a file never has neither.
            header_log.publish(txn, ino, extent, context.header_regions)
        growth += extent.block_count
        growth -= _clear(txn, context, ino, extent.file_block, extents.end_of(extent))
        extents.put_joined(txn, ino, extent, block_size_bytes)
    return growth


def _clear(txn: Txn, context: Context, ino: int, first_block: int, end_block: int) -> int:
    """Take file blocks ``first_block`` <= b < ``end_block`` off the node; returns how many."""
    block_size_bytes = context.block_size_bytes
    spans: list[Span] = []
    cleared = 0
    for extent in extents.overlapping(txn, ino, first_block, end_block):
        start, end = extent.file_block, extents.end_of(extent)
        first, last = max(start, first_block), min(end, end_block)
        if start < first:
            extents.put(txn, ino, extents.cut(extent, start, first, block_size_bytes))
        else:
            extents.delete(txn, ino, extent)
        if last < end:
            extents.put(txn, ino, extents.cut(extent, last, end, block_size_bytes))
        cleared += last - first
        spans += [
            Span(place.region, place.block + first - start, last - first)
            for place in extent.replicas
        ]
    if spans and context.holders(ino):
        _reclaim(txn, spans, NOBODY)
        context.changed(ino)
    elif spans:
        _let_go(txn, context, spans)
    return cleared


def _let_go(txn: Txn, context: Context, spans: list[Span]) -> None:
    """No file shows the blocks and no client trusts that one does: they become free, in memory at
    once. Where headers are kept, after those say so too: no header names a block that somebody else
    writes to. On other durable media, when a power cut cannot give them back to their file."""
    regions = context.header_regions | context.settling_regions
    if regions:
        header_log.clear(txn, [span for span in spans if span.region in regions])
        spans = [span for span in spans if span.region not in regions]
    free_space.give(txn, spans)


def free_cleared(txn: Txn, regions: Iterable[int], through: int) -> None:
    """All changes of these regions' headers with sequences up to ``through`` are durable there:
    what waited for that becomes free."""
    free_space.give(txn, header_log.acknowledge(txn, regions, through))


# --- reclaim ------------------------------------------------------------------------------------


def free_reclaimed(txn: Txn, context: Context, first_sequence: int, end_sequence: int) -> None:
    """Nobody can see what was put into ``reclaim`` under ``first_sequence`` <= s <
    ``end_sequence`` any more: it is let go, but for what clients may still write to."""
    rows = txn.scan(
        schema.RECLAIM,
        schema.reclaim_key(first_sequence, 0, 0),
        schema.reclaim_key(end_sequence, 0, 0),
    )
    spans = _take_rows(txn, [(k, g) for k, g in _granted(rows) if g.client == NOBODY])
    _let_go(txn, context, spans)


def reclaim_grants(txn: Txn, client_id: int) -> frozenset[int]:
    """A client has vanished: all that is granted to it waits in ``reclaim`` until it is fenced.
    Returns the regions where that is."""
    owned = _client_key_range(client_id)
    spans = []
    for key, granted in list(_granted(txn.scan(schema.GRANTS, *owned))):
        _, region, block = schema.unpack_owner_region_block(key)
        txn.delete(schema.GRANTS, key)
        spans.append(Span(region, block, granted.block_count))
    if spans:
        _reclaim(txn, spans, client_id)
    return frozenset(span.region for span in spans)


def free_fenced(txn: Txn, client_id: int, regions: frozenset[int]) -> None:
    """The client can no longer write in these regions: what it had there becomes free (it was
    never a file's: no header names it)."""
    spans = _take_rows(
        txn,
        [
            (key, granted)
            for key, granted in _granted(txn.scan(schema.RECLAIM))
            if granted.client == client_id and schema.unpack_owner_region_block(key)[1] in regions
        ],
    )
    free_space.give(txn, spans)


def _reclaim(txn: Txn, spans: list[Span], client_id: int) -> None:
    sequence = txn.next_counter(b"next_reclaim")
    for span in free_space.coalesced(spans):
        txn.put(
            schema.RECLAIM,
            schema.reclaim_key(sequence, span.region, span.block),
            schema.encode(Granted(span.block_count, 0, client_id)),
        )
        free_space.count(txn, span.region, reclaim=span.block_count)


def _take_rows(txn: Txn, rows: list[tuple[bytes, Granted]]) -> list[Span]:
    """Take the rows out of ``reclaim``; the caller has their blocks."""
    spans = []
    for key, granted in rows:
        _, region, block = schema.unpack_owner_region_block(key)
        txn.delete(schema.RECLAIM, key)
        free_space.count(txn, region, reclaim=-granted.block_count)
        spans.append(Span(region, block, granted.block_count))
    return spans


def _granted(rows: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, Granted]]:
    return ((key, schema.decode_granted(value)) for key, value in rows)


def _client_key_range(client_id: int) -> tuple[bytes, bytes | None]:
    start = schema.grant_key(client_id, 0, 0)
    if client_id == CLIENT_ID_MAX:
        return start, None
    return start, schema.grant_key(client_id + 1, 0, 0)


# --- salvage ------------------------------------------------------------------------------------


def take_salvaged(txn: Txn, ino: int, extent: Extent, block_size_bytes: int) -> bool:
    """Make free blocks, of whichever region, the file's, where it has none yet; their headers say
    so already. False, and nothing is done: one of them is not free."""
    for place in extent.replicas:
        if not free_space.take_exactly(txn, Span(place.region, place.block, extent.block_count)):
            return False
        end = place.block + extent.block_count
        free_space.count(txn, place.region, high_water_blocks=end)
    extents.put_joined(txn, ino, extent, block_size_bytes)
    return True


def claim_rest(txn: Txn, region: int) -> None:
    """What is free in an unclaimed region was somebody's once: clear its headers, after which it
    can be granted."""
    spans = free_space.runs(txn, region)
    header_log.clear(txn, spans)
    for span in spans:
        taken = free_space.take_exactly(txn, span)
        assert taken


# --- regions ------------------------------------------------------------------------------------


def statistics(txn: Txn) -> tuple[TierStatistics, ...]:
    """Size and free space of each tier that has regions, fastest first. Blocks that are not yet
    provisioned count as free: they will be there when they are needed. All of an unclaimed region
    counts as used."""
    totals: dict[Tier, list[int]] = {}
    for region in _regions(txn):
        stored = region.stored
        if stored.lost:
            continue
        tier = totals.setdefault(stored.info.tier, [0, 0])
        tier[0] += stored.info.block_count - len(stored.failed)
        if stored.unclaimed:
            continue
        usage = region.usage
        tier[1] += usage.free_blocks + usage.reclaim_blocks + usage.clearing_blocks
        tier[1] += stored.info.block_count - stored.usable_blocks
    return tuple(TierStatistics(tier, *totals[tier]) for tier in sorted(totals))
