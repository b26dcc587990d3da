"""A metadata server's handler with peers, clock and connections that the tests control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crailfs.errors import CrailError, UnavailableError
from crailfs.records import NodeKind, RegionInfo, StorageServerInfo, Tier
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    CreateNode,
    Invalidate,
    InvalidateReply,
    Invalidation,
    KeepAlive,
    KeepAliveReply,
    Message,
    Opcode,
    RegionState,
    RegisterStorage,
    Role,
    SetAttributes,
    StorageHeartbeat,
    Welcome,
)
from metadata_server.driver import Driver
from metadata_server.handler import MetadataHandler, Timings
from tests.metadata.name_space import BLOCK_SIZE_BYTES, config

TIMINGS = Timings(lease_ms=5_000, session_timeout_ms=10_000, storage_timeout_ms=5_000)


class FakePeer:
    """A connection as ``crailfs.net.server.Peer`` shows it to a handler."""

    def __init__(self, client_id: int, role: Role = Role.CLIENT, *, is_local: bool = True) -> None:
        self.client_id = client_id
        self.role = role
        self.is_local = is_local
        self.description = f"peer {client_id}"
        self.replies: dict[int, Message | CrailError] = {}
        self.pushes: list[tuple[Invalidate, Callable[[Message | CrailError], None]]] = []
        self.closed = ""

    def reply(self, request_id: int, message: Message) -> None:
        assert request_id not in self.replies, "answered twice"
        self.replies[request_id] = message

    def reply_error(self, request_id: int, error: CrailError) -> None:
        assert request_id not in self.replies, "answered twice"
        self.replies[request_id] = error

    def push(
        self, opcode: Opcode, message: Message, on_reply: Callable[[Message | CrailError], None]
    ) -> None:
        assert opcode is Opcode.INVALIDATE and isinstance(message, Invalidate)
        self.pushes.append((message, on_reply))

    def close(self, reason: str) -> None:
        self.closed = self.closed or reason


class Server:
    """A handler whose batches are one request long."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.now_s = 1_000.0
        self.last_request_id = 0
        self.start()

    def start(self) -> None:
        self.driver = Driver.open(config(self.state))
        self.handler = MetadataHandler(self.driver, TIMINGS, lambda: self.now_s)

    def crash_and_restart(self) -> None:
        """What a kill leaves: the journal, and no clean end."""
        self.driver.write_batch()
        self.driver._txn.abort()
        self.driver._state.close()
        self.start()

    def connect(self, client_id: int, **more: Any) -> FakePeer:
        peer = FakePeer(client_id, **more)
        self.welcome(peer)
        return peer

    def welcome(self, peer: FakePeer) -> Welcome:
        welcome = self.handler.welcome(peer)  # type: ignore[arg-type]
        self.handler.batch_done()
        return welcome

    def disconnect(self, peer: FakePeer) -> None:
        for _, on_reply in peer.pushes:
            on_reply(UnavailableError("gone"))
        peer.pushes.clear()
        self.handler.disconnected(peer)  # type: ignore[arg-type]
        self.handler.batch_done()

    def send(
        self, peer: FakePeer, opcode: Opcode, request: Message, request_id: int | None = None
    ) -> int:
        if request_id is None:
            self.last_request_id += 1
            request_id = self.last_request_id
        try:
            self.handler.request(peer, opcode, request_id, request, None)  # type: ignore[arg-type]
        except CrailError as error:
            peer.reply_error(request_id, error)
        self.handler.batch_done()
        return request_id

    def ask(self, peer: FakePeer, opcode: Opcode, request: Message) -> Any:
        reply = peer.replies[self.send(peer, opcode, request)]
        if isinstance(reply, CrailError):
            raise reply
        return reply

    def create(self, peer: FakePeer, name: bytes, **more: Any) -> int:
        request = CreateNode(ROOT_INODE, name, NodeKind.FILE, 0o644, 0, 0, **more)
        ino: int = self.ask(peer, Opcode.CREATE_NODE, request).attributes.ino
        return ino

    def answer(self, peer: FakePeer, *still_open: int) -> tuple[Invalidation, ...]:
        """Answer the oldest push; returns what it asked to invalidate."""
        message, on_reply = peer.pushes.pop(0)
        on_reply(InvalidateReply(still_open))
        self.handler.batch_done()
        return message.entries

    def pass_time(self, seconds: float) -> None:
        while seconds > 0:
            self.now_s += min(seconds, 0.5)
            seconds -= 0.5
            self.handler.tick()

    def keep_alive(self, peer: FakePeer, *renew: int) -> KeepAliveReply:
        reply: KeepAliveReply = self.ask(peer, Opcode.KEEP_ALIVE, KeepAlive(0, renew))
        return reply

    def sync(self) -> None:
        """What the server's task does when ``sync_wanted`` was called."""
        waiters = self.handler.take_sync_waiters()
        self.driver.sync_journal()
        for waiter in waiters:
            waiter()
        self.handler.batch_done()

    def add_storage(self, block_count: int = 100) -> FakePeer:
        peer = self.connect(900, role=Role.STORAGE_SERVER)
        info = RegionInfo(b"r" * 16, Tier.MEMORY, BLOCK_SIZE_BYTES, block_count, False, "")
        server = StorageServerInfo(b"S" * 16, "host", "", "", "", 0, "")
        (region,) = self.ask(
            peer, Opcode.REGISTER_STORAGE, RegisterStorage(server, (info,))
        ).region_ids
        states = (RegionState(region, block_count, ()),)
        self.ask(peer, Opcode.STORAGE_HEARTBEAT, StorageHeartbeat(server.id, states, ()))
        return peer


def chmod(ino: int, mode: int = 0o600) -> SetAttributes:
    return SetAttributes(ino, mode=mode)
