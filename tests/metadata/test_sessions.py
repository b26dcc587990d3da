"""Sessions: what happens to a vanished client's blocks, orphans and remembered replies."""

from __future__ import annotations

from typing import Any

from crailfs.records import ANY_TIER, RegionInfo, StorageServerInfo, Tier
from crailfs.wire.messages import (
    GrantBlocks,
    HeartbeatReply,
    Opcode,
    RegionState,
    RegisterStorage,
    StorageHeartbeat,
)
from metadata_server import schema, sessions
from metadata_server.schema import Session
from tests.metadata.name_space import BLOCK_SIZE_BYTES, CLIENT, NameSpace

SERVERS = (b"A" * 16, b"B" * 16)


def add_servers(space: NameSpace) -> list[int]:
    """Two servers with one region of ten blocks each."""
    region_ids = []
    for server_id in SERVERS:
        info = RegionInfo(server_id, Tier.MEMORY, BLOCK_SIZE_BYTES, 10, False, "")
        server = StorageServerInfo(server_id, server_id[:1].decode(), "", "", "", 0, "")
        reply = space.do(Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,)))
        region_ids += reply.region_ids
        heartbeat(space, server_id, RegionState(reply.region_ids[0], 10, ()))
    return region_ids


def heartbeat(
    space: NameSpace, server_id: bytes, *states: RegionState, fenced: tuple[int, ...] = ()
) -> HeartbeatReply:
    request = StorageHeartbeat(server_id, states, fenced)
    reply: HeartbeatReply = space.do(Opcode.STORAGE_HEARTBEAT, request)
    return reply


def open_session(space: NameSpace) -> bool:
    client_id = space.client_id
    return space.driver.run(lambda txn, _: sessions.open_session(txn, client_id, "h"))


def expire(space: NameSpace) -> None:
    client_id = space.client_id
    space.driver.run(lambda txn, context: sessions.expire(txn, context, client_id), client_id)


def row(space: NameSpace) -> Session | None:
    client_id = space.client_id
    return space.driver.run(lambda txn, _: sessions.find(txn, client_id))


def grant(space: NameSpace, block_count: int, host: str = "") -> Any:
    request = GrantBlocks(ANY_TIER, "", host, block_count, 1)
    return space.do(Opcode.GRANT_BLOCKS, request).runs


def test_a_session_is_new_once(space: NameSpace) -> None:
    assert open_session(space)
    assert not open_session(space)
    space.reopen()
    assert not open_session(space)
    expire(space)
    assert row(space) is None
    assert open_session(space)


def test_granted_blocks_come_back_server_by_server_once_the_client_is_fenced(
    space: NameSpace,
) -> None:
    add_servers(space)
    open_session(space)
    assert len(grant(space, 15, host="A")) == 2
    assert space.free_blocks == 5
    expire(space)
    assert space.free_blocks == 5
    space.assert_sound()
    assert heartbeat(space, SERVERS[0]).fence == heartbeat(space, SERVERS[1]).fence == (CLIENT,)
    reply = heartbeat(space, SERVERS[0], fenced=(CLIENT,))
    assert reply.fence == ()
    assert space.free_blocks == 15
    assert row(space) is not None
    heartbeat(space, SERVERS[1], fenced=(CLIENT,))
    assert space.free_blocks == 20
    assert row(space) is None


def test_only_servers_where_it_could_write_have_to_fence_a_client(space: NameSpace) -> None:
    add_servers(space)
    open_session(space)
    grant(space, 5, host="B")
    expire(space)
    assert heartbeat(space, SERVERS[0]).fence == ()
    assert heartbeat(space, SERVERS[1]).fence == (CLIENT,)


def test_fencing_outlives_a_restart(space: NameSpace) -> None:
    add_servers(space)
    open_session(space)
    grant(space, 5, host="A")
    expire(space)
    space.reopen()
    assert heartbeat(space, SERVERS[0]).fence == (CLIENT,)
    heartbeat(space, SERVERS[0], fenced=(CLIENT,))
    assert space.free_blocks == 20


def test_a_client_that_returns_before_it_was_fenced_begins_anew(space: NameSpace) -> None:
    add_servers(space)
    open_session(space)
    (old,) = grant(space, 5, host="A")
    expire(space)
    assert open_session(space)
    (new,) = grant(space, 5, host="A")
    assert new.block != old.block
    assert heartbeat(space, SERVERS[0], fenced=(CLIENT,)).fence == ()
    assert space.free_blocks == 15
    assert row(space) == Session(CLIENT, "h", 0)


def test_a_fence_that_nobody_asked_for_changes_nothing(space: NameSpace) -> None:
    add_servers(space)
    open_session(space)
    grant(space, 5)
    heartbeat(space, SERVERS[0], fenced=(CLIENT, 12345))
    assert space.free_blocks == 15
    assert row(space) == Session(CLIENT, "h", 0)


def test_an_expired_clients_orphans_are_freed(space: NameSpace) -> None:
    space.add_storage(100)
    node = space.create(b"f")
    space.write(node.ino, 10 * BLOCK_SIZE_BYTES)
    assert space.remove(b"f").held
    assert space.free_blocks == 90
    expire(space)
    assert space.free_blocks == 100


def test_replies_are_forgotten_when_the_client_has_them(space: NameSpace) -> None:
    open_session(space)
    for number in range(5):
        space.create(b"%d" % number)

    def remembered() -> list[int]:
        rows = space.driver.run(lambda txn, _: list(txn.scan(schema.REPLIES)))
        return [schema.unpack_ino_block(key)[1] for key, _ in rows]

    assert remembered() == [1, 2, 3, 4, 5]
    space.driver.run(lambda txn, _: sessions.forget_replies(txn, CLIENT, 4))
    assert remembered() == [4, 5]
    expire(space)
    assert remembered() == []
