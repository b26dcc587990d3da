"""Which extents move where, and what replaces them; time is the test's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from crailfs.errors import ConflictError, FencedError, InvalidError, StaleError
from crailfs.records import (
    ANY_TIER,
    Attributes,
    Extent,
    Location,
    RegionInfo,
    Run,
    StorageClass,
    StorageServerInfo,
    Tier,
)
from crailfs.units import NANOSECONDS_PER_SECOND
from crailfs.wire.messages import (
    CommitFile,
    GetExtents,
    Grant,
    GrantBlocks,
    Move,
    MoveExtent,
    Moves,
    NextMoves,
    Opcode,
    RegionState,
    RegisterStorage,
    ReturnBlocks,
    SetAttributes,
    StorageHeartbeat,
)
from metadata_server import moves, sessions
from metadata_server.context import Context
from metadata_server.heat import HALF_LIFE_S, NODES_MAX, ROTATE_S, Heat
from metadata_server.membership import Membership
from metadata_server.moves import Planner
from metadata_server.txn import Txn
from tests.metadata.name_space import BLOCK_SIZE_BYTES, Clock, NameSpace

OWN = b"own server......"
OTHER = b"other server...."
MOVER = 99
TIER_BLOCKS = 100


class Tiers(NameSpace):
    """Memory and disk on one server, disk on another, and a planner whose clock the test sets."""

    def __init__(self, state: Path) -> None:
        super().__init__(state, Clock())
        self.now_s = 10_000.0
        self.heat = Heat(lambda: self.now_s)
        self.planner = Planner(self.heat, 0.9, 0.8)
        self.regions: dict[int, Tier] = {}
        self.register(OWN, (Tier.MEMORY, False), (Tier.DISK, True))
        self.register(OTHER, (Tier.DISK, True))
        for client in (self.client_id, MOVER):
            self.driver.run(partial(_open_session, client))

    def register(self, server_id: bytes, *tiers: tuple[Tier, bool]) -> None:
        infos = tuple(
            RegionInfo(
                server_id[:-2] + bytes([tier, durable]),
                tier,
                BLOCK_SIZE_BYTES,
                TIER_BLOCKS,
                durable,
                "",
            )
            for tier, durable in tiers
        )
        server = StorageServerInfo(server_id, server_id.decode(), "", "", "", 0, "")
        ids = self.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, infos)).region_ids
        states = tuple(RegionState(region, TIER_BLOCKS, ()) for region in ids)
        self.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server_id, states, ()))
        self.regions.update({region: info.tier for region, info in zip(ids, infos, strict=True)})

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.clock.now_ns += int(seconds * NANOSECONDS_PER_SECOND)

    def file(
        self, number: int, block_count: int, tier: Tier, *, allowed: StorageClass = ANY_TIER
    ) -> int:
        node = self.create(b"%d" % number, storage_class=StorageClass(tier, tier))
        self.write_to(tier, node.ino, block_count)
        self.set_xattr(node.ino, b"user.crail.storage_class", str(allowed).encode())
        return node.ino

    def write_to(self, tier: Tier, ino: int, block_count: int, *, durable: bool = False) -> None:
        extents = self.granted_extents(tier, block_count)
        size = block_count * BLOCK_SIZE_BYTES
        request = CommitFile(ino, extents, (), size, self.clock(), durable=durable)
        self.do(Opcode.COMMIT_FILE, request)

    def granted_extents(self, tier: Tier, block_count: int, host: str = "") -> tuple[Extent, ...]:
        grant: Grant = self.do(
            Opcode.GRANT_BLOCKS,
            GrantBlocks(StorageClass(tier, tier), "", host, block_count, block_count),
        )
        first = 0
        found = []
        for run in grant.runs:
            found.append(
                Extent(
                    first,
                    run.block_count,
                    BLOCK_SIZE_BYTES,
                    BLOCK_SIZE_BYTES,
                    (Location(run.region, run.block, run.generation),),
                    b"".join(b"%8d" % (first + index) for index in range(run.block_count)),
                )
            )
            first += run.block_count
        assert first == block_count
        return tuple(found)

    def next_moves(self, server_id: bytes = OWN, move_limit: int = 64) -> Moves:
        request = NextMoves(server_id, move_limit)
        return self.driver.run(lambda txn, context: self.planner.next_moves(txn, request, context))

    def all_moves(self, server_id: bytes = OWN) -> list[Move]:
        """What one server is told until there is no more, without doing it."""
        for _ in range(100):
            found = self.next_moves(server_id)
            if found.moves or not found.more:
                return list(found.moves)
        raise AssertionError("it never comes to an end")

    def extents(self, ino: int) -> tuple[Extent, ...]:
        found: tuple[Extent, ...] = self.do(Opcode.GET_EXTENTS, GetExtents(ino, 0, 1 << 20)).extents
        return found

    def copies_of(self, old: Extent, tier: Tier) -> tuple[Extent, ...]:
        """As the mover makes them."""
        self.client_id = MOVER
        copies = []
        for granted in self.granted_extents(tier, old.block_count):
            at = 8 * granted.file_block
            copies.append(
                replace(
                    granted,
                    file_block=old.file_block + granted.file_block,
                    checksums=old.checksums[at : at + 8 * granted.block_count],
                )
            )
        last = replace(
            copies[-1],
            tail_stored_bytes=old.tail_stored_bytes,
            tail_visible_bytes=old.tail_visible_bytes,
        )
        return (*copies[:-1], last)

    def carry_out(self, move: Move) -> None:
        self.client_id = MOVER
        copies = self.copies_of(move.extent, move.tier)
        self.do(Opcode.MOVE_EXTENT, MoveExtent(move.attributes.ino, move.extent, copies))

    def move_everything(self, *servers: bytes) -> int:
        """What the movers of these servers do until nothing is left; returns how many moves."""
        count = 0
        for server_id in servers:
            while found := self.all_moves(server_id):
                for move in found:
                    self.carry_out(move)
                count += len(found)
        return count

    def used(self, tier: Tier) -> int:
        self.client_id = 7
        return sum(
            extent.block_count
            for key, extent in self.stored_extents()
            if self.regions[extent.replicas[0].region] is tier
        )

    def stored_extents(self) -> list[tuple[bytes, Extent]]:
        return self.driver.run(
            lambda txn, _: [(key, extent) for _, extent, key in moves._from(txn, b"")]
        )


def _open_session(client: int, txn: Txn, context: Context) -> None:
    sessions.open_session(txn, client, "host")


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[Tiers]:
    tiers = Tiers(tmp_path / "state")
    yield tiers
    tiers.assert_sound()
    tiers.driver.close()


# --- down ---------------------------------------------------------------------------------------


def test_nothing_moves_below_the_high_water_mark(tiers: Tiers) -> None:
    tiers.file(1, 90, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert tiers.next_moves() == Moves(())


def test_above_it_blocks_move_until_the_low_water_mark(tiers: Tiers) -> None:
    for number in range(31):
        tiers.file(number, 3, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert tiers.move_everything(OWN) == 5
    assert tiers.used(Tier.MEMORY) == 78
    assert tiers.used(Tier.DISK) == 15
    tiers.file(100, 3, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert tiers.next_moves() == Moves((), more=False)


def test_the_coldest_move_first_and_what_is_in_use_last(tiers: Tiers) -> None:
    """Though all were used within the patience that a round begins with."""
    files = [tiers.file(number, 10, Tier.MEMORY) for number in range(10)]
    for ino in files:
        tiers.heat.use(ino)
    tiers.pass_time(20)
    for ino in (files[0], files[1], files[5]):
        tiers.heat.use(ino)
    tiers.pass_time(1)
    moved = [move.attributes.ino for move in tiers.all_moves()]
    assert moved == [files[2], files[3]]


def test_what_is_used_all_the_time_moves_if_there_is_nothing_else(tiers: Tiers) -> None:
    files = [tiers.file(number, 10, Tier.MEMORY) for number in range(10)]
    found: list[Move] = []
    for _ in range(10):
        for ino in files:
            tiers.heat.use(ino)
        tiers.pass_time(0.01)
        found += tiers.next_moves().moves
        if found:
            break
    assert found


def test_a_node_is_cold_by_its_times_after_a_restart(tiers: Tiers) -> None:
    """When nothing is remembered."""
    old = tiers.file(1, 50, Tier.MEMORY)
    tiers.pass_time(100)
    tiers.file(2, 45, Tier.MEMORY)
    assert [move.attributes.ino for move in tiers.next_moves().moves] == [old]


def test_times_that_are_yet_to_come_do_not_hold_a_file_where_it_is(tiers: Tiers) -> None:
    file = tiers.file(1, 95, Tier.MEMORY)
    in_ten_years_ns = tiers.clock() + 315_000_000 * NANOSECONDS_PER_SECOND
    tiers.do(Opcode.SET_ATTRIBUTES, SetAttributes(file, mtime_ns=in_ten_years_ns))
    tiers.pass_time(1_000)
    assert [move.attributes.ino for move in tiers.all_moves()] == [file]


def test_each_server_moves_what_lies_in_its_own_regions(tiers: Tiers) -> None:
    tiers.file(1, 95, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert tiers.all_moves(OTHER) == []
    assert len(tiers.all_moves(OWN)) == 1


@pytest.mark.parametrize("allowed", ["memory", "pmem>memory"])
def test_the_class_decides_how_far_down(tiers: Tiers, allowed: str) -> None:
    tiers.file(1, 95, Tier.MEMORY, allowed=StorageClass.parse(allowed))
    tiers.pass_time(1_000)
    assert tiers.all_moves() == []
    assert not tiers.next_moves().more, "it does not look again at once"


def test_what_is_pinned_stays(tiers: Tiers) -> None:
    pinned = tiers.file(1, 50, Tier.MEMORY)
    tiers.set_xattr(pinned, b"user.crail.pin", b"true")
    other = tiers.file(2, 45, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert [move.attributes.ino for move in tiers.all_moves()] == [other]


def test_a_slower_tier_is_not_filled_beyond_its_own_high_water_mark(tiers: Tiers) -> None:
    for number in range(10):
        tiers.file(number, 10, Tier.MEMORY)
    tiers.file(100, 90, Tier.DISK)
    tiers.file(101, 75, Tier.DISK)
    tiers.pass_time(1_000)
    assert tiers.move_everything(OWN) == 1, "180 of 200 blocks are the mark"
    assert not tiers.next_moves().more


@pytest.mark.parametrize("server_id", [b"", b"x" * 16, b"x" * 600])
def test_only_servers_of_the_cluster_are_told(tiers: Tiers, server_id: bytes) -> None:
    with pytest.raises(InvalidError):
        tiers.next_moves(server_id)


def test_a_server_that_counts_as_dead_has_nothing_to_move_down(tiers: Tiers) -> None:
    """It was held up, and asks before it registers again."""
    membership = Membership(tiers.driver, timeout_s=5, clock_s=lambda: tiers.now_s)
    tiers.file(1, 95, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert tiers.next_moves().moves
    membership.heard(OTHER)
    membership.expire()
    assert tiers.next_moves() == Moves(())


def test_what_goes_down_is_urgent_when_the_tier_is_nearly_full(tiers: Tiers) -> None:
    tiers.file(1, 94, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert not tiers.next_moves().urgent
    tiers.file(2, 1, Tier.MEMORY)
    assert tiers.next_moves().urgent


def test_a_request_looks_at_a_bounded_number_of_extents(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "ROWS_MAX", 4)
    files = [tiers.file(number, 1, Tier.MEMORY) for number in range(95)]
    tiers.pass_time(1_000)
    for first in range(0, 12, 4):
        found = tiers.next_moves()
        assert [move.attributes.ino for move in found.moves] == files[first : first + 4]
        assert found.more
    assert len(tiers.next_moves(move_limit=1).moves) == 1


# --- up -----------------------------------------------------------------------------------------


def heat_up(tiers: Tiers, *files: int, seconds: int = 5) -> None:
    for _ in range(seconds):
        tiers.pass_time(1)
        for ino in files:
            tiers.heat.use(ino)


def test_a_file_that_is_used_again_and_again_moves_up(tiers: Tiers) -> None:
    hot, warm = tiers.file(1, 10, Tier.DISK), tiers.file(2, 10, Tier.DISK)
    heat_up(tiers, hot)
    heat_up(tiers, warm, seconds=2)
    (move,) = [*tiers.next_moves(OWN).moves, *tiers.next_moves(OTHER).moves]
    assert (move.attributes.ino, move.tier) == (hot, Tier.MEMORY)
    tiers.carry_out(move)
    assert tiers.used(Tier.MEMORY) == 10
    assert [*tiers.next_moves(OWN).moves, *tiers.next_moves(OTHER).moves] == []


def test_all_of_a_hot_file_moves_up_however_many_extents_it_has(
    tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "ROWS_MAX", 4)
    hot = tiers.file(1, 1, Tier.DISK)
    for file_block in range(1, 12):
        (extent,) = tiers.granted_extents(Tier.DISK, 1)
        size = (file_block + 1) * BLOCK_SIZE_BYTES
        commit = CommitFile(hot, (replace(extent, file_block=file_block),), (), size, 0)
        tiers.do(Opcode.COMMIT_FILE, commit)
    assert len(tiers.extents(hot)) == 12
    heat_up(tiers, hot)
    told = set()
    for _ in range(8):
        for server_id in (OWN, OTHER):
            found = tiers.next_moves(server_id)
            told |= {move.extent.file_block for move in found.moves}
    assert told == set(range(12))


def test_not_beyond_the_low_water_mark(tiers: Tiers) -> None:
    tiers.file(1, 75, Tier.MEMORY)
    files = [tiers.file(number, 3, Tier.DISK) for number in range(2, 8)]
    heat_up(tiers, *files)
    assert tiers.move_everything(OWN, OTHER) == 1
    assert tiers.used(Tier.MEMORY) == 78


def test_what_cools_down_does_not_move_up(tiers: Tiers) -> None:
    hot = tiers.file(1, 10, Tier.DISK)
    heat_up(tiers, hot)
    tiers.pass_time(3 * HALF_LIFE_S)
    assert [*tiers.next_moves(OWN).moves, *tiers.next_moves(OTHER).moves] == []


def test_neither_a_pinned_file_nor_one_whose_class_forbids_it_moves_up(tiers: Tiers) -> None:
    pinned = tiers.file(1, 10, Tier.DISK)
    tiers.set_xattr(pinned, b"user.crail.pin", b"true")
    slow = tiers.file(2, 10, Tier.DISK, allowed=StorageClass.parse("nvme>disk"))
    heat_up(tiers, pinned, slow)
    assert [*tiers.next_moves(OWN).moves, *tiers.next_moves(OTHER).moves] == []


def test_what_was_made_durable_does_not_move_to_memory(tiers: Tiers) -> None:
    file = tiers.file(1, 10, Tier.DISK)
    tiers.write_to(Tier.DISK, file, 10, durable=True)
    heat_up(tiers, file)
    assert [*tiers.next_moves(OWN).moves, *tiers.next_moves(OTHER).moves] == []
    (extent,) = tiers.extents(file)
    copies = tiers.copies_of(extent, Tier.MEMORY)
    with pytest.raises(InvalidError):
        tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, extent, copies))
    for copy in copies:
        give_back(tiers, copy)


def test_a_sync_of_what_is_committed_already_counts_and_changes_no_time(tiers: Tiers) -> None:
    file = tiers.file(1, 10, Tier.DISK)
    before = tiers.attributes(file)
    after: Attributes = tiers.do(
        Opcode.COMMIT_FILE, CommitFile(file, (), (), 0, tiers.clock(), durable=True)
    )
    assert after == replace(before, synced=True)


def test_from_memory_down_to_disk_is_no_loss(tiers: Tiers) -> None:
    file = tiers.file(1, 10, Tier.MEMORY)
    tiers.write_to(Tier.MEMORY, file, 85, durable=True)
    tiers.file(2, 10, Tier.MEMORY)
    tiers.pass_time(1_000)
    assert file in [move.attributes.ino for move in tiers.all_moves()]


# --- replacing ----------------------------------------------------------------------------------


def give_back(tiers: Tiers, extent: Extent) -> None:
    place = extent.replicas[0]
    run = Run(place.region, place.block, extent.block_count, place.generation)
    tiers.do(Opcode.RETURN_BLOCKS, ReturnBlocks((run,)))


def test_copies_take_the_place_of_an_extent_and_nothing_else_changes(tiers: Tiers) -> None:
    file = tiers.file(1, 10, Tier.MEMORY)
    before = tiers.attributes(file)
    (old,) = tiers.extents(file)
    copies = tiers.copies_of(old, Tier.DISK)
    tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, old, copies))
    assert tiers.attributes(file) == replace(before, moves=before.moves + 1)
    assert tiers.extents(file) == copies
    assert tiers.outcome.invalidations == ()
    assert tiers.used(Tier.MEMORY) == 0


def test_part_of_an_extent_that_has_grown_since_can_move(tiers: Tiers) -> None:
    file = tiers.file(1, 4, Tier.MEMORY)
    (old,) = tiers.extents(file)
    first = replace(old, block_count=2, checksums=old.checksums[:16])
    copies = tiers.copies_of(first, Tier.DISK)
    tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, first, copies))
    moved, rest = tiers.extents(file)
    assert moved == copies[0]
    assert (rest.file_block, rest.block_count, rest.checksums) == (2, 2, old.checksums[16:])


@pytest.mark.parametrize(
    ("name", "value"), [(b"user.crail.pin", b"true"), (b"user.crail.storage_class", b"memory")]
)
def test_what_was_pinned_or_bound_to_its_tier_meanwhile_stays(
    tiers: Tiers, name: bytes, value: bytes
) -> None:
    file = tiers.file(1, 8, Tier.MEMORY)
    (old,) = tiers.extents(file)
    copies = tiers.copies_of(old, Tier.DISK)
    tiers.client_id = 7
    tiers.set_xattr(file, name, value)
    tiers.client_id = MOVER
    with pytest.raises(ConflictError, match="it stays"):
        tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, old, copies))
    assert tiers.extents(file) == (old,)
    for copy in copies:
        give_back(tiers, copy)


@pytest.mark.parametrize("change", ["rewritten", "cut", "removed"])
def test_what_changed_meanwhile_is_a_conflict(tiers: Tiers, change: str) -> None:
    file = tiers.file(1, 4, Tier.MEMORY)
    (old,) = tiers.extents(file)
    copies = tiers.copies_of(old, Tier.DISK)
    tiers.client_id = 7
    if change == "rewritten":
        tiers.write_to(Tier.MEMORY, file, 1)
    elif change == "cut":
        tiers.do(Opcode.SET_ATTRIBUTES, SetAttributes(file, size=3 * BLOCK_SIZE_BYTES + 5))
    else:
        tiers.remove(b"1", not_open=file)
    tiers.client_id = MOVER
    with pytest.raises(StaleError if change == "removed" else ConflictError):
        tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, old, copies))
    for copy in copies:
        give_back(tiers, copy)


@pytest.mark.parametrize("fault", ["short", "other bytes", "other blocks", "twice", "not granted"])
def test_copies_that_are_none_are_refused(tiers: Tiers, fault: str) -> None:
    file = tiers.file(1, 4, Tier.MEMORY)
    (old,) = tiers.extents(file)
    (copy,) = tiers.copies_of(old, Tier.DISK)
    place = copy.replicas[0]
    bad = {
        "short": (replace(copy, block_count=3, checksums=copy.checksums[:24]),),
        "other bytes": (replace(copy, checksums=b"x" * 32),),
        "other blocks": (replace(copy, file_block=1),),
        "twice": (copy, copy),
        "not granted": (replace(copy, replicas=(replace(place, block=place.block + 50),)),),
    }[fault]
    with pytest.raises((InvalidError, FencedError)):
        tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, old, bad))
    assert tiers.extents(file) == (old,)
    give_back(tiers, copy)


def test_old_blocks_wait_for_those_who_may_still_read_them(tiers: Tiers) -> None:
    file = tiers.file(1, 4, Tier.MEMORY)
    (old,) = tiers.extents(file)
    copies = tiers.copies_of(old, Tier.DISK)
    tiers.driver.holders = lambda ino, asking: frozenset({5}) if ino == file else frozenset()
    tiers.do(Opcode.MOVE_EXTENT, MoveExtent(file, old, copies))
    assert {invalidation.ino for invalidation in tiers.outcome.invalidations} == {file}
    assert tiers.driver.audit().counts["reclaim_blocks"] == 4


# --- heat ---------------------------------------------------------------------------------------


def test_heat_forgets_and_stays_small() -> None:
    now_s = 0.0
    heat = Heat(lambda: now_s)
    heat.use(1)
    now_s = 5.0
    assert heat.idle_s(1) == 5.0
    assert heat.idle_s(2) is None
    now_s = 1.5 * ROTATE_S
    heat.use(2)
    assert heat.idle_s(1) == now_s
    now_s = 3 * ROTATE_S
    heat.use(3)
    assert heat.idle_s(1) is None
    for ino in range(3 * NODES_MAX):
        heat.use(ino)
    assert len(heat._current) + len(heat._previous) <= 2 * NODES_MAX


def test_uses_in_one_go_are_one_use() -> None:
    now_s = 0.0
    heat = Heat(lambda: now_s)
    for _ in range(100):
        heat.use(1)
    assert heat.hot() == []
