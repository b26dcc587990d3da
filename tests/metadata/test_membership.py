"""Storage servers and their regions: registration, growth, failures, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from crailfs.errors import InvalidError
from crailfs.limits import REGIONS_PER_SERVER_MAX
from crailfs.records import ANY_TIER, RegionInfo, StorageServerInfo, Tier
from crailfs.wire.messages import (
    ClusterMap,
    GetClusterMap,
    GetStatistics,
    GrantBlocks,
    HeartbeatReply,
    Opcode,
    RegionState,
    RegisterStorage,
    ReturnBlocks,
    StorageHeartbeat,
)
from metadata_server import sessions
from metadata_server.membership import Membership
from tests.metadata.name_space import BLOCK_SIZE_BYTES, NameSpace

SERVER = StorageServerInfo(b"S" * 16, "host", "rack", "/sock", "::1", 1234, "boot")


def region(letter: bytes, block_count: int = 100, tier: Tier = Tier.MEMORY) -> RegionInfo:
    return RegionInfo(letter * 16, tier, BLOCK_SIZE_BYTES, block_count, False, "/dev/shm/x")


def register(space: NameSpace, *regions: RegionInfo, server: StorageServerInfo = SERVER) -> Any:
    return space.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, regions))


def heartbeat(
    space: NameSpace, region_id: int, usable_blocks: int, failed: Sequence[int] = ()
) -> HeartbeatReply:
    state = RegionState(region_id, usable_blocks, tuple(failed))
    reply: HeartbeatReply = space.do(
        Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(SERVER.id, (state,), ())
    )
    return reply


def cluster_map(space: NameSpace) -> ClusterMap:
    reply: ClusterMap = space.do(Opcode.GET_CLUSTER_MAP, GetClusterMap())
    return reply


def grant(space: NameSpace, block_count: int) -> Any:
    client_id = space.client_id
    space.driver.run(lambda txn, _: sessions.open_session(txn, client_id, ""))
    return space.do(Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", block_count, 1)).runs


def test_registration_may_be_repeated(space: NameSpace) -> None:
    first = register(space, region(b"a"), region(b"b"))
    assert len(set(first.region_ids)) == 2
    swapped = register(space, region(b"b"), region(b"a"))
    assert swapped.region_ids == first.region_ids[::-1]
    known = cluster_map(space)
    assert known.block_size_bytes == BLOCK_SIZE_BYTES
    assert [server.id for server in known.servers] == [SERVER.id]
    assert {placed.id: placed.info.uuid for placed in known.regions} == {
        first.region_ids[0]: b"a" * 16,
        first.region_ids[1]: b"b" * 16,
    }


def test_a_returning_servers_new_address_is_shown(space: NameSpace) -> None:
    register(space, region(b"a"))
    register(space, region(b"a"), server=replace(SERVER, tcp_port=4321))
    assert [server.tcp_port for server in cluster_map(space).servers] == [4321]


def test_a_region_that_does_not_come_back_is_lost_until_it_does(space: NameSpace) -> None:
    kept, missing = register(space, region(b"a"), region(b"b")).region_ids
    heartbeat(space, missing, 100)
    heartbeat(space, kept, 10)
    register(space, region(b"a"))
    assert [placed.id for placed in cluster_map(space).regions] == [kept]
    assert {run.region for run in grant(space, 100)} == {kept}
    register(space, region(b"a"), region(b"b"))
    assert [placed.id for placed in cluster_map(space).regions] == [kept, missing]
    assert {run.region for run in grant(space, 100)} == {missing}


def test_usable_blocks_become_free_as_they_grow_and_never_shrink(space: NameSpace) -> None:
    (region_id,) = register(space, region(b"a")).region_ids
    assert heartbeat(space, region_id, 10).high_water_blocks == (0,)
    assert space.free_blocks == 10
    grant(space, 6)
    assert heartbeat(space, region_id, 30).high_water_blocks == (6,)
    assert space.free_blocks == 24
    heartbeat(space, region_id, 5)
    assert space.free_blocks == 24
    (tier,) = space.do(Opcode.GET_STATISTICS, GetStatistics()).tiers
    assert (tier.total_blocks, tier.free_blocks) == (100, 94)


def test_failed_blocks_are_not_handed_out(space: NameSpace) -> None:
    (region_id,) = register(space, region(b"a", 10)).region_ids
    heartbeat(space, region_id, 10, [0, 4, 9, 77])
    blocks = {run.block + n for run in grant(space, 10) for n in range(run.block_count)}
    assert blocks == {1, 2, 3, 5, 6, 7, 8}
    (tier,) = space.do(Opcode.GET_STATISTICS, GetStatistics()).tiers
    assert (tier.total_blocks, tier.free_blocks) == (7, 0)


def test_a_block_that_fails_in_use_is_retired_when_it_comes_back(space: NameSpace) -> None:
    (region_id,) = register(space, region(b"a", 10)).region_ids
    heartbeat(space, region_id, 10)
    runs = grant(space, 10)
    heartbeat(space, region_id, 10, [3])
    space.assert_sound()
    space.do(Opcode.RETURN_BLOCKS, ReturnBlocks(runs))
    heartbeat(space, region_id, 10, [3])
    assert space.free_blocks == 9


def test_an_unknown_server_is_told_to_register(space: NameSpace) -> None:
    reply: HeartbeatReply = space.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"?" * 16, (), ()))
    assert not reply.known


def test_a_silent_server_is_dead_until_it_registers_again(space: NameSpace) -> None:
    now_s = 100.0
    (region_id,) = register(space, region(b"a")).region_ids
    membership = Membership(space.driver, timeout_s=5, clock_s=lambda: now_s)
    now_s = 104.0
    membership.expire()
    assert heartbeat(space, region_id, 10).known
    (server,) = membership.with_silence(cluster_map(space)).servers
    assert server.alive and server.seconds_since_heard == 4.0
    membership.heard(SERVER.id)
    now_s = 109.5
    membership.expire()
    assert not cluster_map(space).servers[0].alive
    assert not heartbeat(space, region_id, 10).known
    register(space, region(b"a"))
    assert heartbeat(space, region_id, 10).known


@pytest.mark.parametrize(
    "bad",
    [
        RegisterStorage(replace(SERVER, id=b"short"), ()),
        RegisterStorage(SERVER, (replace(region(b"a"), uuid=b""),)),
        RegisterStorage(SERVER, (region(b"a"), region(b"a"))),
        RegisterStorage(SERVER, (replace(region(b"a"), block_size_bytes=8192),)),
        RegisterStorage(SERVER, (region(b"a", 0),)),
        RegisterStorage(SERVER, (region(b"a", 1 << 40),)),
        RegisterStorage(replace(SERVER, host="h" * 65), ()),
        RegisterStorage(
            SERVER,
            tuple(
                replace(region(b"a"), uuid=number.to_bytes(16, "big"))
                for number in range(REGIONS_PER_SERVER_MAX + 1)
            ),
        ),
    ],
)
def test_senseless_registrations_are_refused(space: NameSpace, bad: RegisterStorage) -> None:
    with pytest.raises(InvalidError):
        space.do(Opcode.REGISTER_STORAGE, bad)
    assert cluster_map(space).servers == ()


def test_a_region_keeps_its_server_and_its_kind(space: NameSpace) -> None:
    (region_id,) = register(space, region(b"a")).region_ids
    heartbeat(space, region_id, 50)
    with pytest.raises(InvalidError):
        register(space, region(b"a"), server=replace(SERVER, id=b"T" * 16))
    with pytest.raises(InvalidError):
        register(space, region(b"a", tier=Tier.DISK))
    with pytest.raises(InvalidError):
        register(space, region(b"a", 49))
    assert register(space, region(b"a", 200)).region_ids == (region_id,)


@pytest.mark.parametrize(
    "state", [RegionState(77, 1, ()), RegionState(-1, 1, ()), RegionState(1 << 33, 1, ())]
)
def test_heartbeats_for_other_regions_are_refused(space: NameSpace, state: RegionState) -> None:
    register(space, region(b"a"))
    with pytest.raises(InvalidError):
        space.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(SERVER.id, (state,), ()))


def test_more_usable_blocks_than_blocks_are_refused(space: NameSpace) -> None:
    (region_id,) = register(space, region(b"a")).region_ids
    with pytest.raises(InvalidError):
        heartbeat(space, region_id, 101)


@pytest.mark.parametrize("server_id", [b"", b"short", bytes(600)])
def test_heartbeats_of_impossible_servers_are_refused(space: NameSpace, server_id: bytes) -> None:
    with pytest.raises(InvalidError):
        space.do(Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server_id, (), ()))
