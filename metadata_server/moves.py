"""What should move between tiers: cold blocks out of a tier that is full, hot ones up into one that
has room. A storage server asks for what lies in its own regions, and moves it.

A tier is looked at as a whole, as a grant does: its regions on all servers together. Above the high
water mark blocks move down until the low water mark is reached. A hand per storage server goes
round the table of extents like a clock's, some rows a request, and takes what has not been used
for its ``patience_s``. A round in which all was younger makes that half of the oldest it saw, so
the next one takes the older part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from crailfs.errors import InvalidError
from crailfs.records import Attributes, Extent, Tier
from crailfs.units import NANOSECONDS_PER_SECOND
from crailfs.wire.messages import Move, Moves, NextMoves
from metadata_server import extents, region_use, schema
from metadata_server.context import Context
from metadata_server.heat import Heat
from metadata_server.ops.register_storage import ID_BYTES
from metadata_server.region_use import TierUse
from metadata_server.schema import StoredRegion
from metadata_server.txn import Txn

ROWS_MAX: Final = 1_024
"""Extents that one request looks at: a few milliseconds."""
MOVES_MAX: Final = 64
PATIENCE_S: Final = 60.0
"""What was not used for this long is cold at once."""
REST_S: Final = 10.0
"""After a round that met nothing that may move."""


@dataclass(slots=True)
class _Hand:
    """Where one storage server's search stands."""

    next_key: bytes = b""
    """In ``extents``; empty: at its beginning, with a new round."""
    patience_s: float = PATIENCE_S
    found: bool = False
    """Whether this round has found anything to move down."""
    oldest_s: float | None = None
    """How long what this round left where it is has not been used, at most; ``None``: it met
    nothing that may move."""
    rests_until_ns: int = 0
    promoted: tuple[int, int] = (0, 0)
    """Where to go on with hot nodes: inode and file block."""


class _Place(NamedTuple):
    """Where an extent lies."""

    tier: Tier
    durable: bool


@dataclass
class _Search:
    """One request's."""

    server_id: bytes
    move_limit: int
    now_ns: int
    own: dict[int, _Place]
    """The asking server's regions."""
    tiers: dict[Tier, TierUse]
    """As they will be when all of ``moves`` are done."""
    rows_left: int
    moves: list[Move] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.moves) >= self.move_limit or self.rows_left <= 0


class Planner:
    """``high_water`` and ``low_water`` are parts of a tier."""

    def __init__(self, heat: Heat, high_water: float, low_water: float) -> None:
        self._heat = heat
        self._high_water = high_water
        self._low_water = low_water
        self._full: set[Tier] = set()
        """Tiers that have been above the high water mark and not yet at the low one since."""
        self._hands: dict[bytes, _Hand] = {}

    def next_moves(self, txn: Txn, request: NextMoves, context: Context) -> Moves:
        """Raises ``InvalidError`` for a server that is not one of the cluster."""
        is_id = len(request.server_id) == ID_BYTES
        if not is_id or txn.get(schema.SERVERS, request.server_id) is None:
            raise InvalidError(f"storage server {request.server_id.hex()} is not registered")
        if request.move_limit < 1:
            raise InvalidError(f"{request.move_limit} moves: at least one must be asked for")
        search = _Search(
            request.server_id,
            min(request.move_limit, MOVES_MAX),
            context.now_ns,
            dict(_places(txn, request.server_id)),
            region_use.of_tiers(txn),
            ROWS_MAX,
        )
        self._note_full(search.tiers)
        # A server that counts as dead may ask before it registers again: its tiers can be missing.
        own_tiers = {place.tier for place in search.own.values()} & search.tiers.keys()
        hand = self._hands.setdefault(request.server_id, _Hand())
        urgent = more = False
        full = [tier for tier in own_tiers & self._full if self._goes_down_from(tier, search)]
        if not full:
            self._hands[request.server_id] = hand = _Hand(promoted=hand.promoted)
        elif hand.rests_until_ns <= context.now_ns:
            nearly_full = (1.0 + self._high_water) / 2
            urgent = any(search.tiers[tier].share >= nearly_full for tier in full)
            more = self._demote(txn, hand, search, full)
        if any(self._has_room(tier, use) for tier, use in search.tiers.items()):
            more |= self._promote(txn, hand, search)
        return Moves(tuple(search.moves), urgent, more)

    # --- down -----------------------------------------------------------------------------------

    def _note_full(self, tiers: dict[Tier, TierUse]) -> None:
        for tier, use in tiers.items():
            if use.share > self._high_water:
                self._full.add(tier)
            elif use.share <= self._low_water:
                self._full.discard(tier)

    def _goes_down_from(self, tier: Tier, search: _Search) -> bool:
        """Whether there is a slower tier that is not full itself."""
        return any(
            other > tier and other not in self._full and use.total_blocks
            for other, use in search.tiers.items()
        )

    def _demote(self, txn: Txn, hand: _Hand, search: _Search, full: list[Tier]) -> bool:
        """Move the hand on. True: it has not yet been everywhere where it might find something."""
        for ino, extent, key in _from(txn, hand.next_key):
            enough = all(search.tiers[tier].share <= self._low_water for tier in full)
            if search.is_done or enough:
                hand.next_key = key
                return not enough
            search.rows_left -= 1
            self._demote_one(txn, hand, search, ino, extent)
        hand.next_key = b""
        if not hand.found and hand.oldest_s is None:
            hand.rests_until_ns = search.now_ns + int(REST_S * NANOSECONDS_PER_SECOND)
            return False
        if not hand.found and hand.oldest_s is not None:
            hand.patience_s = hand.oldest_s / 2
        hand.found, hand.oldest_s = False, None
        return True

    def _demote_one(self, txn: Txn, hand: _Hand, search: _Search, ino: int, extent: Extent) -> None:
        place = search.own.get(extent.replicas[0].region)
        if place is None or place.tier not in self._full:
            return
        use = search.tiers.get(place.tier)
        if use is None or use.share <= self._low_water:
            return
        node = txn.node(ino)
        target = None if node.placement.pinned else self._slower(search, node, place, extent)
        if target is None:
            return
        idle_s = self._idle_s(node, search.now_ns)
        if idle_s < hand.patience_s:
            hand.oldest_s = max(idle_s, hand.oldest_s or 0.0)
            return
        hand.found = True
        _add(search, node, extent, place.tier, target)

    def _slower(
        self, search: _Search, node: Attributes, place: _Place, extent: Extent
    ) -> Tier | None:
        """The next slower tier that may take the extent and does not become full by it."""
        for tier in sorted(search.tiers):
            use = search.tiers[tier]
            if tier > place.tier and _may_move(node, place, tier, use):
                used_blocks = use.used_blocks + extent.block_count
                if used_blocks <= self._high_water * use.total_blocks:
                    return tier
        return None

    def _idle_s(self, node: Attributes, now_ns: int) -> float:
        """Seconds since the node's last use that is known of."""
        remembered = self._heat.idle_s(node.ino)
        if remembered is not None:
            return remembered
        # Anybody may set times that are yet to come: such a node is the youngest, not ever younger.
        used_ns = min(now_ns, max(node.atime_ns, node.mtime_ns))
        return (now_ns - used_ns) / NANOSECONDS_PER_SECOND

    # --- up -------------------------------------------------------------------------------------

    def _has_room(self, tier: Tier, use: TierUse, block_count: int = 1) -> bool:
        room = use.used_blocks + block_count <= self._low_water * use.total_blocks
        return room and tier not in self._full

    def _promote(self, txn: Txn, hand: _Hand, search: _Search) -> bool:
        """Go through the hot nodes, from where the last request came to. True: there are more."""
        hot = self._heat.hot()
        at_ino, at_block = hand.promoted
        for ino in (ino for ino in hot if ino >= at_ino):
            node = txn.find_node(ino)
            first_block = at_block if ino == at_ino else 0
            if node is None or node.placement.pinned or not node.block_count:
                continue
            for extent in extents.overlapping(
                txn, ino, first_block, extents.FILE_BLOCK_END, max(1, search.rows_left)
            ):
                if search.is_done:
                    hand.promoted = ino, extent.file_block
                    return True
                search.rows_left -= 1
                self._promote_one(search, node, extent)
                first_block = extents.end_of(extent)
            if search.is_done:
                hand.promoted = ino, first_block
                return True
        hand.promoted = 0, 0
        return False

    def _promote_one(self, search: _Search, node: Attributes, extent: Extent) -> None:
        place = search.own.get(extent.replicas[0].region)
        if place is None:
            return
        for tier in sorted(search.tiers):
            use = search.tiers[tier]
            if (
                tier < place.tier
                and _may_move(node, place, tier, use)
                and self._has_room(tier, use, extent.block_count)
            ):
                _add(search, node, extent, place.tier, tier)
                return


def _may_move(node: Attributes, place: _Place, tier: Tier, use: TierUse) -> bool:
    """Whether the node's class allows the tier, and no durability is lost there."""
    storage_class = node.placement.storage_class
    loses = place.durable and node.synced and not use.durable
    return storage_class.first <= tier <= storage_class.last and not loses


def _add(search: _Search, node: Attributes, extent: Extent, source: Tier, target: Tier) -> None:
    search.moves.append(Move(node, extent, target))
    if source in search.tiers:
        search.tiers[source].used_blocks -= extent.block_count
    search.tiers[target].used_blocks += extent.block_count


def _places(txn: Txn, server_id: bytes) -> Iterator[tuple[int, _Place]]:
    for key, value in txn.scan(schema.REGIONS):
        stored: StoredRegion = schema.decode_region(value)
        if stored.server_id == server_id and not stored.lost and not stored.unclaimed:
            yield schema.unpack_region(key), _Place(stored.info.tier, stored.info.durable)


def _from(txn: Txn, start: bytes) -> Iterator[tuple[int, Extent, bytes]]:
    """Inode, extent and key of each row from ``start`` on."""
    for key, value in txn.scan(schema.EXTENTS, start):
        yield schema.unpack_ino_block(key)[0], schema.decode_extent(value), key
