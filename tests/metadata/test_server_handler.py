"""When the metadata server answers: with peers, clock and connections that the tests control."""

from __future__ import annotations

import pytest

from crailfs.errors import (
    CrailError,
    FencedError,
    NotPermittedError,
    StaleError,
    TryAgainError,
)
from crailfs.records import ANY_TIER, NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    CommitFile,
    CreateNode,
    Empty,
    EndSession,
    GetAttributes,
    GetExtents,
    GetStatus,
    GrantBlocks,
    Invalidation,
    KeepAlive,
    Lookup,
    Message,
    Opcode,
    ReadDirectory,
    ReleaseInodes,
    RemoveNode,
    Role,
    SetAttributes,
    StorageHeartbeat,
    SyncMetadata,
)
from tests.metadata.handling import FakePeer, Server, chmod
from tests.metadata.name_space import BLOCK_SIZE_BYTES
from tests.metadata.test_commit import extent

CREATE_F = CreateNode(ROOT_INODE, b"f", NodeKind.FILE, 0o644, 0, 0)


# --- invalidation -------------------------------------------------------------------------------


def test_a_change_is_acknowledged_after_the_lease_holder_has_answered(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    change = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert change not in writer.replies
    # What does not depend on it is answered meanwhile.
    assert server.ask(writer, Opcode.GET_ATTRIBUTES, GetAttributes(ino)).mode == 0o600
    assert server.answer(reader) == (Invalidation(ino, b"", False),)
    assert not isinstance(writer.replies[change], CrailError)


def test_who_holds_no_lease_is_not_asked(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino, other = server.create(writer, b"f"), server.create(writer, b"g")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(other))
    server.ask(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert not reader.pushes and not writer.pushes


def test_a_lease_runs_out(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    for _ in range(3):
        server.pass_time(5)
        server.keep_alive(writer)
        server.keep_alive(reader)
    server.ask(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert not reader.pushes


def test_keep_alive_renews_leases_and_names_what_is_gone(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    for _ in range(4):
        server.pass_time(4)
        server.keep_alive(writer)
        assert server.keep_alive(reader, ino, 4711).gone == (4711,)
    server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert len(reader.pushes) == 1


def test_a_missing_name_is_leased_too(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    server.send(reader, Opcode.LOOKUP, Lookup(ROOT_INODE, b"new"))
    request = CreateNode(ROOT_INODE, b"new", NodeKind.FILE, 0o644, 0, 0)
    made = server.send(writer, Opcode.CREATE_NODE, request)
    assert made not in writer.replies
    assert Invalidation(ROOT_INODE, b"new", False) in server.answer(reader)
    assert made in writer.replies


def test_a_holder_that_does_not_answer_is_disconnected_when_its_lease_is_over(
    server: Server,
) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    change = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    server.pass_time(4.9)
    assert change not in writer.replies and not reader.closed
    server.pass_time(0.2)
    assert change in writer.replies and reader.closed
    server.answer(reader)


def test_all_holders_are_waited_for(server: Server) -> None:
    writer, readers = server.connect(1), [server.connect(n) for n in (2, 3, 4)]
    ino = server.create(writer, b"f")
    for reader in readers:
        server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    change = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    for reader in readers:
        assert change not in writer.replies
        server.answer(reader)
    assert change in writer.replies


def test_a_local_holder_that_is_gone_trusts_nothing(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    first = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    server.disconnect(reader)
    assert first in writer.replies
    second = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino, 0o644))
    assert second in writer.replies


def test_a_remote_holder_that_is_gone_is_waited_for_until_its_lease_is_over(
    server: Server,
) -> None:
    writer, reader = server.connect(1), server.connect(2, is_local=False)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    first = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    server.disconnect(reader)
    assert first not in writer.replies
    server.pass_time(5.1)
    assert first in writer.replies
    second = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino, 0o644))
    assert second not in writer.replies
    # When it is back, it trusts nothing of what it had.
    server.connect(2, is_local=False)
    assert second in writer.replies


def test_freed_blocks_are_granted_to_nobody_before_holders_have_answered(server: Server) -> None:
    server.add_storage(block_count=10)
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    _commit_whole_region(server, writer, ino)
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    server.send(writer, Opcode.SET_ATTRIBUTES, SetAttributes(ino, size=0))
    wanted = GrantBlocks(ANY_TIER, "", "", 10, 1)
    with pytest.raises(TryAgainError):
        server.ask(writer, Opcode.GRANT_BLOCKS, wanted)
    server.answer(reader)
    assert server.ask(writer, Opcode.GRANT_BLOCKS, wanted).runs[0].block_count == 10


def _commit_whole_region(server: Server, peer: FakePeer, ino: int) -> None:
    (run,) = server.ask(peer, Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", 10, 1)).runs
    size = 10 * BLOCK_SIZE_BYTES
    server.ask(peer, Opcode.COMMIT_FILE, CommitFile(ino, (extent(0, run),), (), size, 0))


# --- replay -------------------------------------------------------------------------------------


def test_a_replay_waits_with_its_original_and_runs_once(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2)
    server.ask(reader, Opcode.READ_DIRECTORY, ReadDirectory(ROOT_INODE, b"", 10))
    request_id = server.send(writer, Opcode.CREATE_NODE, CREATE_F)
    server.disconnect(writer)
    again = server.connect(1)
    server.send(again, Opcode.CREATE_NODE, CREATE_F, request_id)
    assert not again.replies
    server.answer(reader)
    assert not isinstance(again.replies[request_id], CrailError)
    assert not writer.replies


def test_a_replay_after_a_crash_gets_the_first_reply(server: Server) -> None:
    writer = server.connect(1)
    request_id = server.send(writer, Opcode.CREATE_NODE, CREATE_F)
    server.crash_and_restart()
    again = server.connect(1)
    server.send(again, Opcode.CREATE_NODE, CREATE_F, request_id)
    assert again.replies[request_id] == writer.replies[request_id]


def test_a_change_with_a_holder_that_loses_its_session_is_acknowledged(server: Server) -> None:
    writer, reader = server.connect(1), server.connect(2, is_local=False)
    ino = server.create(writer, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    server.disconnect(reader)
    for _ in range(5):
        server.pass_time(2.5)
        server.keep_alive(writer)
    change = server.send(writer, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert change in writer.replies


# --- an unclean start ---------------------------------------------------------------------------


def test_after_a_crash_changes_wait_until_every_client_is_back(server: Server) -> None:
    server.connect(1)
    server.connect(2)
    server.crash_and_restart()
    first = server.connect(1)
    change = server.send(first, Opcode.CREATE_NODE, CREATE_F)
    assert change not in first.replies
    server.ask(first, Opcode.GET_ATTRIBUTES, GetAttributes(ROOT_INODE))
    server.connect(2)
    assert not isinstance(first.replies[change], CrailError)


def test_after_a_crash_changes_wait_no_longer_than_a_lease(server: Server) -> None:
    server.connect(1)
    server.connect(2)
    server.crash_and_restart()
    first = server.connect(1)
    change = server.send(first, Opcode.CREATE_NODE, CREATE_F)
    server.pass_time(4.9)
    assert change not in first.replies
    server.pass_time(0.2)
    assert not isinstance(first.replies[change], CrailError)


def test_a_deferred_change_of_a_client_that_left_is_not_made(server: Server) -> None:
    server.connect(1)
    server.connect(2)
    server.crash_and_restart()
    first = server.connect(1)
    server.send(first, Opcode.CREATE_NODE, CREATE_F)
    server.disconnect(first)
    server.connect(2)
    again = server.connect(1)
    page = server.ask(again, Opcode.READ_DIRECTORY, ReadDirectory(ROOT_INODE, b"", 10))
    assert page.entries == ()


def test_after_a_clean_stop_nobody_is_waited_for(server: Server) -> None:
    server.connect(1)
    server.connect(2)
    server.driver.close()
    server.start()
    server.create(server.connect(1), b"f")


def test_blocks_that_waited_for_answers_at_a_crash_come_back(server: Server) -> None:
    server.add_storage(block_count=10)
    writer, reader = server.connect(1), server.connect(2)
    ino = server.create(writer, b"f")
    _commit_whole_region(server, writer, ino)
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    server.send(writer, Opcode.SET_ATTRIBUTES, SetAttributes(ino, size=0))
    server.crash_and_restart()
    again = server.connect(1)
    wanted = GrantBlocks(ANY_TIER, "", "", 10, 1)
    server.pass_time(4)
    with pytest.raises(TryAgainError):
        server.ask(again, Opcode.GRANT_BLOCKS, wanted)
    server.add_storage(block_count=10)
    server.pass_time(1.1)
    assert server.ask(again, Opcode.GRANT_BLOCKS, wanted).runs[0].block_count == 10


# --- orphans ------------------------------------------------------------------------------------


def remove(server: Server, peer: FakePeer, name: bytes, ino: int) -> int:
    request = RemoveNode(ROOT_INODE, name, directory=False, not_open=ino)
    return server.send(peer, Opcode.REMOVE_NODE, request)


def exists(server: Server, peer: FakePeer, ino: int) -> bool:
    try:
        server.ask(peer, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    except CrailError:
        return False
    return True


def test_a_node_that_another_client_has_open_lives_until_it_is_released(server: Server) -> None:
    remover, reader = server.connect(1), server.connect(2)
    ino = server.create(remover, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    removal = remove(server, remover, b"f", ino)
    assert Invalidation(ino, b"", True) in server.answer(reader, ino)
    assert removal in remover.replies
    assert exists(server, reader, ino)
    server.ask(reader, Opcode.RELEASE_INODES, ReleaseInodes((ino,)))
    assert not exists(server, reader, ino)


def test_a_node_that_no_other_client_has_open_is_freed_by_their_answer(server: Server) -> None:
    remover, reader = server.connect(1), server.connect(2)
    ino = server.create(remover, b"f")
    server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    remove(server, remover, b"f", ino)
    server.answer(reader)
    assert not exists(server, reader, ino)


def test_a_client_that_missed_a_removal_is_asked_when_it_is_back(server: Server) -> None:
    remover, reader, other = server.connect(1), server.connect(2), server.connect(3)
    opened, closed = server.create(remover, b"f"), server.create(remover, b"g")
    for ino in (opened, closed):
        server.ask(reader, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    server.disconnect(reader)
    remove(server, remover, b"f", opened)
    remove(server, remover, b"g", closed)
    assert exists(server, other, opened) and exists(server, other, closed)
    reader = server.connect(2)
    while reader.pushes:
        server.answer(reader, opened)
    while other.pushes:
        server.answer(other)
    assert exists(server, other, opened) and not exists(server, other, closed)


def test_orphans_outlive_a_crash_and_their_holder_is_asked_again(server: Server) -> None:
    holder = server.connect(1)
    ino = server.create(holder, b"f")
    server.ask(holder, Opcode.REMOVE_NODE, RemoveNode(ROOT_INODE, b"f", directory=False))
    server.crash_and_restart()
    holder = server.connect(1)
    assert exists(server, holder, ino)
    server.answer(holder, ino)
    assert exists(server, holder, ino)
    server.ask(holder, Opcode.RELEASE_INODES, ReleaseInodes((ino,)))
    assert not exists(server, holder, ino)


def test_orphans_of_an_ended_session_are_freed(server: Server) -> None:
    holder, other = server.connect(1), server.connect(2)
    ino = server.create(holder, b"f")
    server.ask(holder, Opcode.REMOVE_NODE, RemoveNode(ROOT_INODE, b"f", directory=False))
    server.disconnect(holder)
    for _ in range(5):
        server.pass_time(2.5)
        server.keep_alive(other)
    assert not exists(server, other, ino)


# --- sessions -----------------------------------------------------------------------------------


def test_a_client_that_reconnects_in_time_keeps_its_session(server: Server) -> None:
    peer = FakePeer(1)
    assert server.welcome(peer).session_is_new
    server.disconnect(peer)
    server.pass_time(9)
    assert not server.welcome(FakePeer(1)).session_is_new


def test_a_silent_client_loses_its_session(server: Server) -> None:
    peer = server.connect(1)
    server.pass_time(1)
    server.pass_time(10.5)
    assert peer.closed
    assert server.welcome(FakePeer(1)).session_is_new


def test_silence_while_the_server_itself_was_held_up_does_not_count(server: Server) -> None:
    peer = server.connect(1)
    server.pass_time(5)
    server.now_s += 3_600
    server.handler.tick()
    server.pass_time(5)
    assert not peer.closed and exists(server, peer, ROOT_INODE)


def test_a_client_that_asks_anything_keeps_its_session(server: Server) -> None:
    peer = server.connect(1)
    for _ in range(5):
        server.pass_time(6)
        exists(server, peer, ROOT_INODE)
    assert not peer.closed


def test_a_newer_connection_of_the_same_client_replaces_the_older(server: Server) -> None:
    old = server.connect(1)
    new = server.connect(1)
    assert old.closed
    server.disconnect(old)
    assert exists(server, new, ROOT_INODE)


def test_blocks_of_a_vanished_client_come_back_when_it_is_fenced(server: Server) -> None:
    storage = server.add_storage(block_count=10)
    client = server.connect(1)
    server.ask(client, Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", 10, 1))
    server.disconnect(client)
    for _ in range(4):
        server.pass_time(3)
        reply = server.ask(storage, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), ()))
    assert reply.fence == (1,)
    assert server.driver.audit().counts.get("free_blocks", 0) == 0
    server.ask(storage, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), (1,)))
    assert server.driver.audit().counts["free_blocks"] == 10


def test_a_client_that_says_that_it_ends_gives_everything_back_at_once(server: Server) -> None:
    storage = server.add_storage(block_count=10)
    client, other = server.connect(1), server.connect(2)
    ino = server.create(other, b"f")
    server.ask(client, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    server.ask(client, Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", 10, 1))
    assert server.ask(client, Opcode.END_SESSION, EndSession()) == Empty()
    with pytest.raises(FencedError):
        server.ask(client, Opcode.GET_ATTRIBUTES, GetAttributes(ino))
    # Nobody waits for its leases, its blocks wait for nothing but the storage server.
    server.ask(other, Opcode.SET_ATTRIBUTES, chmod(ino))
    assert not client.pushes
    reply = server.ask(storage, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), ()))
    assert reply.fence == (1,)
    server.ask(storage, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), (1,)))
    assert server.driver.audit().counts["free_blocks"] == 10


# --- roles, durability, status ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "opcode", "request_"),
    [
        (Role.CLIENT, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), ())),
        (Role.OPERATOR, Opcode.SET_ATTRIBUTES, chmod(ROOT_INODE)),
        (Role.OPERATOR, Opcode.KEEP_ALIVE, KeepAlive(0, ())),
        (Role.STORAGE_SERVER, Opcode.GET_ATTRIBUTES, GetAttributes(ROOT_INODE)),
    ],
)
def test_each_role_has_its_operations(
    server: Server, role: Role, opcode: Opcode, request_: Message
) -> None:
    peer = server.connect(1, role=role)
    with pytest.raises(NotPermittedError):
        server.ask(peer, opcode, request_)


def test_a_durable_commit_is_answered_after_a_sync(server: Server) -> None:
    wanted: list[bool] = []
    server.handler.sync_wanted = lambda: wanted.append(True)
    client = server.connect(1)
    ino = server.create(client, b"f")
    durable = server.send(client, Opcode.COMMIT_FILE, CommitFile(ino, (), (), 0, 0, durable=True))
    synced = server.send(client, Opcode.SYNC_METADATA, SyncMetadata())
    assert wanted and durable not in client.replies and synced not in client.replies
    server.sync()
    assert durable in client.replies and synced in client.replies


def test_a_durable_commit_that_fails_is_answered_at_once(server: Server) -> None:
    client = server.connect(1)
    with pytest.raises(CrailError):
        server.ask(client, Opcode.COMMIT_FILE, CommitFile(4711, (), (), 0, 0, durable=True))


def test_status_counts_what_happened(server: Server) -> None:
    server.add_storage()
    client = server.connect(1)
    server.create(client, b"f")
    operator = server.connect(2, role=Role.OPERATOR)
    server.now_s += 3
    status = server.ask(operator, Opcode.GET_STATUS, GetStatus())
    assert status.session_count == 1
    assert status.counters["requests_create_node"] == 1
    assert status.uptime_seconds == 3
    assert status.statistics.node_count == 2
    assert status.cluster.servers[0].seconds_since_heard == 3


def test_what_is_asked_in_vain_is_no_use_of_a_node(server: Server) -> None:
    client = server.connect(1)
    ino = server.create(client, b"f")
    server.ask(client, Opcode.GET_EXTENTS, GetExtents(ino, 0, 1))
    assert server.handler._heat.idle_s(ino) == 0.0
    with pytest.raises(StaleError):
        server.ask(client, Opcode.GET_EXTENTS, GetExtents(ino + 1, 0, 1))
    with pytest.raises(StaleError):
        server.ask(client, Opcode.COMMIT_FILE, CommitFile(ino + 1, (), (), 0, 0))
    assert server.handler._heat.idle_s(ino + 1) is None
