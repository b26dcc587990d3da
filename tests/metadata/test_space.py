"""Granting blocks: where they come from, in which order, and where they go back to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from crailfs.errors import FencedError, InvalidError, NoSpaceError, TryAgainError
from crailfs.limits import GRANT_BLOCKS_MAX
from crailfs.records import ANY_TIER, RegionInfo, Run, StorageClass, StorageServerInfo, Tier
from crailfs.wire.messages import (
    GetStatistics,
    GrantBlocks,
    Invalidation,
    Opcode,
    RegionState,
    RegisterStorage,
    ReturnBlocks,
    StorageHeartbeat,
)
from metadata_server import schema, sessions
from metadata_server.context import Context
from metadata_server.space import free_reclaimed
from metadata_server.txn import Txn
from tests.metadata.name_space import BLOCK_SIZE_BYTES, NameSpace

MEMORY_ONLY = StorageClass(Tier.MEMORY, Tier.MEMORY)


def add_server(
    space: NameSpace, name: str, tiers: Sequence[tuple[Tier, int]], *, rack: str = ""
) -> tuple[int, ...]:
    """A server with a region of so many blocks, all usable, for each of ``tiers``; their ids."""
    regions = tuple(
        RegionInfo(
            f"{name}{number}".encode().ljust(16, b"."), tier, BLOCK_SIZE_BYTES, blocks, False, name
        )
        for number, (tier, blocks) in enumerate(tiers)
    )
    server_id = name.encode().ljust(16, b".")
    server = StorageServerInfo(server_id, name, rack, "", "", 0, "boot")
    reply = space.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, regions))
    states = tuple(
        RegionState(region_id, blocks, ())
        for region_id, (_, blocks) in zip(reply.region_ids, tiers, strict=True)
    )
    space.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server_id, states, ()))
    region_ids: tuple[int, ...] = reply.region_ids
    return region_ids


def open_session(space: NameSpace) -> None:
    client_id = space.client_id
    space.driver.run(lambda txn, _: sessions.open_session(txn, client_id, "h"))


def grant(
    space: NameSpace,
    block_count: int,
    contiguous_blocks: int = 1,
    *,
    storage_class: StorageClass = ANY_TIER,
    location: str = "",
    host: str = "",
) -> tuple[Run, ...]:
    request = GrantBlocks(storage_class, location, host, block_count, contiguous_blocks)
    runs: tuple[Run, ...] = space.do(Opcode.GRANT_BLOCKS, request).runs
    return runs


def places(runs: Sequence[Run]) -> list[tuple[int, int, int]]:
    return [(run.region, run.block, run.block_count) for run in runs]


def give_back(space: NameSpace, *runs: Run) -> None:
    space.do(Opcode.RETURN_BLOCKS, ReturnBlocks(runs))


def free_runs(space: NameSpace) -> list[tuple[int, int, int]]:
    rows = space.driver.run(lambda txn, _: list(txn.scan(schema.FREE)))
    return [(*schema.unpack_region_block(key), schema.unpack_u64(value)) for key, value in rows]


def test_blocks_come_from_low_addresses_and_merge_when_they_return(space: NameSpace) -> None:
    (region,) = add_server(space, "a", [(Tier.MEMORY, 100)])
    open_session(space)
    first = grant(space, 10)
    second = grant(space, 10)
    third = grant(space, 10)
    assert [(run.block, run.block_count) for run in first + second + third] == [
        (0, 10),
        (10, 10),
        (20, 10),
    ]
    assert first[0].generation < second[0].generation < third[0].generation
    give_back(space, *first)
    give_back(space, *third)
    assert free_runs(space) == [(region, 0, 10), (region, 20, 80)]
    give_back(space, *second)
    assert free_runs(space) == [(region, 0, 100)]


def test_a_long_run_is_preferred_and_fragments_are_used_when_there_is_none(
    space: NameSpace,
) -> None:
    (region,) = add_server(space, "a", [(Tier.MEMORY, 60)])
    open_session(space)
    runs = [grant(space, 10)[0] for _ in range(6)]
    for hole in (0, 2, 4, 5):
        give_back(space, runs[hole])
    assert places(grant(space, 15, 15)) == [(region, 40, 15)]
    (low,) = grant(space, 5, 1)
    assert low.block == 0
    assert sum(run.block_count for run in grant(space, 20, 20)) == 20


def test_part_of_a_run_can_be_returned_once(space: NameSpace) -> None:
    add_server(space, "a", [(Tier.MEMORY, 100)])
    open_session(space)
    (run,) = grant(space, 10)
    middle = Run(run.region, run.block + 3, 4, run.generation)
    give_back(space, middle)
    with pytest.raises(FencedError):
        give_back(space, middle)
    with pytest.raises(FencedError):
        give_back(space, run)
    give_back(space, Run(run.region, 0, 3, run.generation), Run(run.region, 7, 3, run.generation))
    assert len(free_runs(space)) == 1


@pytest.mark.parametrize(
    "run",
    [
        Run(1, 0, 11, 1),
        Run(1, 0, 10, 2),
        Run(1, 0, 0, 1),
        Run(1, 0, -1, 1),
        Run(1, -1, 1, 1),
        Run(2, 0, 1, 1),
        Run(1, 1 << 70, 1, 1),
        Run(-1, 0, 1, 1),
        Run(1 << 40, 0, 1, 1),
    ],
)
def test_what_was_not_granted_cannot_be_returned(space: NameSpace, run: Run) -> None:
    add_server(space, "a", [(Tier.MEMORY, 100)])
    open_session(space)
    (granted,) = grant(space, 10)
    region = granted.region + run.region - 1
    generation = granted.generation + run.generation - 1
    with pytest.raises(FencedError):
        give_back(space, Run(region, run.block, run.block_count, generation))


def test_another_clients_blocks_cannot_be_returned(space: NameSpace) -> None:
    add_server(space, "a", [(Tier.MEMORY, 100)])
    open_session(space)
    runs = grant(space, 10)
    space.client_id = 8
    open_session(space)
    with pytest.raises(FencedError):
        give_back(space, *runs)


def test_tiers_are_used_in_order_and_fall_through_when_full(space: NameSpace) -> None:
    memory, disk = add_server(space, "a", [(Tier.MEMORY, 10), (Tier.DISK, 10)])
    open_session(space)
    assert {run.region for run in grant(space, 8)} == {memory}
    assert places(grant(space, 8)) == [(memory, 8, 2)]
    assert places(grant(space, 20)) == [(disk, 0, 10)]
    with pytest.raises(NoSpaceError):
        grant(space, 1)


def test_a_class_of_one_tier_does_not_fall_through(space: NameSpace) -> None:
    add_server(space, "a", [(Tier.MEMORY, 10), (Tier.DISK, 10)])
    open_session(space)
    grant(space, 10, storage_class=MEMORY_ONLY)
    with pytest.raises(NoSpaceError):
        grant(space, 1, storage_class=MEMORY_ONLY)
    assert grant(space, 1)


def test_the_location_comes_before_the_host_and_the_host_before_its_rack(space: NameSpace) -> None:
    (far,) = add_server(space, "far", [(Tier.MEMORY, 50)], rack="r2")
    (near,) = add_server(space, "near", [(Tier.MEMORY, 10)], rack="r1")
    (own,) = add_server(space, "own", [(Tier.MEMORY, 10)], rack="r1")
    open_session(space)
    assert grant(space, 1, location="far", host="own")[0].region == far
    assert grant(space, 1, location="r2", host="own")[0].region == far
    assert grant(space, 1, host="elsewhere")[0].region == far
    # One request spans regions once the preferred one is used up.
    assert [run.region for run in grant(space, 30, host="own")] == [own, near, far]


def test_regions_of_dead_servers_are_not_granted(space: NameSpace) -> None:
    (region,) = add_server(space, "a", [(Tier.MEMORY, 10)])
    open_session(space)

    def die(txn: Txn, _: Context) -> None:
        ((key, value),) = list(txn.scan(schema.SERVERS))
        stored = schema.decode_server(value)
        info = StorageServerInfo(stored.info.id, "a", "", "", "", 0, "boot", alive=False)
        txn.put(schema.SERVERS, key, schema.encode(schema.StoredServer(info)))

    space.driver.run(die)
    with pytest.raises(TryAgainError):
        grant(space, 1)
    add_server(space, "a", [(Tier.MEMORY, 10)])
    assert grant(space, 1)[0].region == region


def test_what_is_being_provisioned_is_waited_for_until_it_stops_growing(space: NameSpace) -> None:
    server_id = b"g".ljust(16, b".")
    server = StorageServerInfo(server_id, "g", "", "", "", 0, "boot")
    info = RegionInfo(b"g" * 16, Tier.MEMORY, BLOCK_SIZE_BYTES, 100, False, "g")
    ids = space.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,))).region_ids
    open_session(space)

    def heartbeat(usable_blocks: int) -> None:
        states = (RegionState(ids[0], usable_blocks, ()),)
        space.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server_id, states, ()))

    with pytest.raises(TryAgainError):
        grant(space, 1)
    heartbeat(10)
    assert grant(space, 50)[0].block_count == 10
    with pytest.raises(TryAgainError):
        grant(space, 1)
    heartbeat(10)
    with pytest.raises(TryAgainError):
        grant(space, 1)
    space.clock.now_ns += schema.STALLED_NS
    heartbeat(10)
    with pytest.raises(NoSpaceError):
        grant(space, 1)
    heartbeat(20)
    assert places(grant(space, 50)) == [(ids[0], 10, 10)]


def test_without_a_session_nothing_is_granted(space: NameSpace) -> None:
    add_server(space, "a", [(Tier.MEMORY, 10)])
    with pytest.raises(FencedError):
        grant(space, 1)


@pytest.mark.parametrize(
    ("block_count", "contiguous_blocks"), [(0, 1), (-1, 1), (GRANT_BLOCKS_MAX + 1, 1), (1, 0)]
)
def test_senseless_grants_are_refused(
    space: NameSpace, block_count: int, contiguous_blocks: int
) -> None:
    add_server(space, "a", [(Tier.MEMORY, 10)])
    open_session(space)
    with pytest.raises(InvalidError):
        grant(space, block_count, contiguous_blocks)


def test_a_removed_file_is_free_space_at_once(space: NameSpace) -> None:
    space.add_storage(100)

    def free_blocks() -> int:
        (tier,) = space.do(Opcode.GET_STATISTICS, GetStatistics()).tiers
        assert tier.total_blocks == 100
        blocks: int = tier.free_blocks
        return blocks

    node = space.create(b"a")
    space.write(node.ino, 30 * BLOCK_SIZE_BYTES)
    assert free_blocks() == 70
    space.remove(b"a", not_open=node.ino)
    assert free_blocks() == 100


def test_blocks_that_wait_for_reclaim_count_as_free_and_are_waited_for(space: NameSpace) -> None:
    space.add_storage(30)
    node = space.create(b"a")
    space.write(node.ino, 30 * BLOCK_SIZE_BYTES)
    space.driver.holders = lambda ino, asking: frozenset({99})
    space.set(node.ino, size=0)
    assert Invalidation(node.ino, b"", False) in space.outcome.invalidations
    (tier,) = space.do(Opcode.GET_STATISTICS, GetStatistics()).tiers
    assert tier.free_blocks == 30
    with pytest.raises(TryAgainError):
        grant(space, 1)
    space.driver.run(
        lambda txn, context: free_reclaimed(txn, context, 0, txn.state(b"next_reclaim"))
    )
    assert sum(run.block_count for run in grant(space, 30)) == 30


def test_a_disk_block_is_not_used_again_while_a_power_cut_could_give_it_back(
    space: NameSpace,
) -> None:
    space.add_storage(4, Tier.DISK)
    ino = space.create(b"file").ino
    space.write(ino, 4 * BLOCK_SIZE_BYTES)
    space.remove(b"file", not_open=ino)
    other = space.create(b"other").ino
    space.driver.free_settled()
    with pytest.raises(TryAgainError, match="until the journal is synced"):
        space.write(other, 1)
    space.assert_sound()
    space.driver.sync_journal()
    space.driver.synced_header_changes = space.driver.next_header_change
    space.driver.free_settled()
    space.write(other, 4 * BLOCK_SIZE_BYTES)


def test_what_waits_for_a_sync_is_free_after_a_restart(space: NameSpace) -> None:
    space.add_storage(4, Tier.DISK)
    ino = space.create(b"file").ino
    space.write(ino, 4 * BLOCK_SIZE_BYTES)
    space.remove(b"file", not_open=ino)
    space.reopen()
    space.driver.free_settled()
    space.assert_sound()
    assert space.free_blocks == 4
