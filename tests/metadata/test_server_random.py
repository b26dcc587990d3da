"""Several clients, whose connections, answers and clocks misbehave at random, against one handler.

Fault model: a client's connection breaks at any time and it comes back or stays away until its
session has expired; it answers invalidations late, or only by losing its connection; requests are
sent again after a reconnect, under their old ids; the server is killed between batches. Storage
servers report whom they fenced at some later time.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from crailfs.errors import CrailError, StaleError
from crailfs.records import ANY_TIER, NodeKind, Run
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    CommitFile,
    CreateNode,
    CreateReply,
    GetAttributes,
    GetStatistics,
    Grant,
    GrantBlocks,
    Lookup,
    Message,
    Opcode,
    ReleaseInodes,
    RemoveNode,
    RemoveReply,
    RenameNode,
    ReturnBlocks,
    Role,
    SetAttributes,
    StorageHeartbeat,
)
from tests.metadata.test_commit import extent
from tests.metadata.test_server_handler import FakePeer, Server

NAMES = (b"a", b"b", b"c", b"d")
BLOCKS = 200
STEPS = 400


class RandomClient:
    """Sends random operations, remembers what has no reply yet and what it was granted."""

    def __init__(self, server: Server, choose: random.Random, client_id: int) -> None:
        self.server = server
        self.choose = choose
        self.client_id = client_id
        self.peer: FakePeer | None = None
        self.unanswered: dict[int, tuple[Opcode, Message]] = {}
        self.runs: list[Run] = []
        self.held: set[int] = set()
        self.next_id = 1
        self.inodes: list[int] = [ROOT_INODE]

    def connect(self) -> None:
        self.peer = FakePeer(self.client_id)
        if self.server.welcome(self.peer).session_is_new:
            self.unanswered.clear()
            self.runs.clear()
            self.held.clear()
            self.next_id += 100_000
        for request_id, (opcode, request) in list(self.unanswered.items()):
            self.server.send(self.peer, opcode, request, request_id)
        self.collect()

    def disconnect(self) -> None:
        if self.peer is not None:
            self.collect()
            peer, self.peer = self.peer, None
            self.server.disconnect(peer)

    def collect(self) -> None:
        if self.peer is None:
            return
        for request_id in [n for n in self.unanswered if n in self.peer.replies]:
            _, request = self.unanswered.pop(request_id)
            self.taken(request, self.peer.replies[request_id])

    def taken(self, request: Message, reply: Message | CrailError) -> None:
        if isinstance(reply, CrailError):
            if isinstance(request, CommitFile) and isinstance(reply, StaleError):
                place = request.extents[0].replicas[0]
                self.runs.append(
                    Run(
                        place.region,
                        place.block,
                        request.extents[0].block_count,
                        place.generation,
                    )
                )
        elif isinstance(reply, Grant):
            self.runs += reply.runs
        elif isinstance(reply, RemoveReply) and reply.held:
            self.held.add(reply.ino)
        elif isinstance(reply, CreateReply):
            self.inodes = [*self.inodes[-5:], reply.attributes.ino]

    def send(self, opcode: Opcode, request: Message) -> None:
        assert self.peer is not None
        self.next_id += 1
        self.unanswered[self.next_id] = (opcode, request)
        self.server.send(self.peer, opcode, request, self.next_id)
        self.collect()

    def step(self) -> None:
        if self.peer is None or self.peer.closed:
            self.disconnect()
            if self.choose.random() < 0.3:
                self.connect()
            return
        choose, name, ino = self.choose, self.choose.choice(NAMES), self.choose.choice(self.inodes)
        kind = choose.randrange(10)
        if kind == 0:
            self.send(Opcode.CREATE_NODE, CreateNode(ROOT_INODE, name, NodeKind.FILE, 0o644, 0, 0))
        elif kind == 1:
            self.send(Opcode.LOOKUP, Lookup(ROOT_INODE, name))
        elif kind == 2:
            self.send(Opcode.GET_ATTRIBUTES, GetAttributes(ino))
        elif kind == 3:
            not_open = choose.choice((0, ino))
            self.send(Opcode.REMOVE_NODE, RemoveNode(ROOT_INODE, name, False, not_open))
        elif kind == 4:
            other = choose.choice(NAMES)
            self.send(Opcode.RENAME_NODE, RenameNode(ROOT_INODE, name, ROOT_INODE, other))
        elif kind == 5 and ino != ROOT_INODE:
            self.send(Opcode.SET_ATTRIBUTES, SetAttributes(ino, size=choose.randrange(100_000)))
        elif kind == 6 and self.held:
            self.send(Opcode.RELEASE_INODES, ReleaseInodes((self.held.pop(),)))
        elif kind == 7 and len(self.runs) < 4:
            blocks = choose.randrange(1, 12)
            self.send(Opcode.GRANT_BLOCKS, GrantBlocks(ANY_TIER, "", "", blocks, 1))
        elif kind == 8 and self.runs:
            run = self.runs.pop()
            if choose.random() < 0.3:
                self.send(Opcode.RETURN_BLOCKS, ReturnBlocks((run,)))
            elif ino != ROOT_INODE:
                new = extent(choose.randrange(10), run)
                size = (new.file_block + new.block_count) * 4096
                self.send(Opcode.COMMIT_FILE, CommitFile(ino, (new,), (), size, 0))
            else:
                self.runs.append(run)
        elif kind == 9:
            self.misbehave()

    def misbehave(self) -> None:
        assert self.peer is not None
        if self.choose.random() < 0.15:
            self.disconnect()
        else:
            self.answer(self.choose.randrange(1, 4))

    def answer(self, count: int) -> None:
        peer = self.peer
        while peer is not None and peer.pushes and count:
            count -= 1
            still_open = self.choose.sample(self.inodes, self.choose.randrange(len(self.inodes)))
            self.held.update(still_open)
            self.server.answer(peer, *still_open)


@pytest.mark.parametrize("seed", range(8))
def test_random_clients_leave_a_sound_name_space(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    choose = random.Random(seed)
    server = Server(tmp_path / "state")
    clients = [RandomClient(server, choose, client_id) for client_id in (1, 2, 3)]
    server.add_storage(BLOCKS)
    for _ in range(STEPS):
        choose.choice(clients).step()
        for client in clients:
            client.collect()
        event = choose.random()
        if event < 0.05:
            server.pass_time(choose.choice((0.5, 3, 6)))
            heartbeat(server, choose.random() < 0.5)
        elif event < 0.06:
            server.crash_and_restart()
            assert server.driver.audit().findings == (), f"seed {seed}"
            server.add_storage(BLOCKS)
            for client in clients:
                client.peer = None
    settle(server, clients)
    assert server.driver.audit().findings == ()
    # All clients are gone: what is not in a file is free.
    counts = server.driver.audit().counts
    operator = server.connect(901, role=Role.OPERATOR)
    (tier,) = server.ask(operator, Opcode.GET_STATISTICS, GetStatistics()).tiers
    assert counts.get("granted_blocks", 0) == counts.get("reclaim_blocks", 0) == 0
    assert tier.free_blocks == counts.get("free_blocks", 0)
    server.driver.close()


def heartbeat(server: Server, fence: bool) -> None:
    storage = server.connect(900, role=Role.STORAGE_SERVER)
    reply = server.ask(storage, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(b"S" * 16, (), ()))
    if not reply.known:
        server.add_storage(BLOCKS)
    elif fence:
        fenced = StorageHeartbeat(b"S" * 16, (), reply.fence)
        server.ask(storage, Opcode.STORAGE_HEARTBEAT, fenced)


def settle(server: Server, clients: list[RandomClient]) -> None:
    """Everybody leaves for good; every timer runs out; every request has had its answer."""
    for client in clients:
        if client.peer is None or client.peer.closed:
            client.disconnect()
            client.connect()
    server.pass_time(6)
    for _ in range(20):
        for client in clients:
            if client.peer is not None and not client.peer.closed:
                client.answer(1_000)
                client.collect()
    for client in clients:
        if client.peer is not None and not client.peer.closed:
            assert client.unanswered == {}
        client.disconnect()
    server.add_storage(BLOCKS)
    server.pass_time(12)
    server.add_storage(BLOCKS)
    heartbeat(server, True)
