"""A server whose answers each test chooses, and a peer that sends whatever bytes it is told to."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from crailfs.config import Credentials
from crailfs.errors import CrailError
from crailfs.net.address import connect_socket, parse_address
from crailfs.net.client import RpcClient
from crailfs.net.server import Peer, serve
from crailfs.records import Attributes, NodeKind, Placement
from crailfs.wire.codec import decode_error, decode_reply, request_frame
from crailfs.wire.connection import NEED_DATA, Connection, Frame
from crailfs.wire.handshake import ConnectingSide
from crailfs.wire.header import ERROR
from crailfs.wire.messages import Empty, Lookup, Message, Opcode, ReadBlocks, Role, Welcome

CREDENTIALS = Credentials(cluster_id=b"the test cluster", secret=b"the tests' secret")
OPERATIONS = frozenset(Opcode) - {Opcode.HELLO, Opcode.PROOF, Opcode.AUDIT}
LOOKUP = Lookup(1, b"name")

Answer = Callable[[Peer, int, Any, memoryview | None], None]


def attributes(ino: int) -> Attributes:
    return Attributes(ino, NodeKind.FILE, 0o644, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, Placement())


class Handler:
    """Answers LOOKUP with the parent's number, READ_BLOCKS and WRITE_BLOCKS from ``memory``,
    and what is in ``answers`` as that says."""

    def __init__(self, memory_bytes: int = 1 << 20) -> None:
        self.memory = memoryview(bytearray(memory_bytes))
        self.answers: dict[Opcode, Answer] = {}
        self.peers: list[Peer] = []
        self.requests: list[tuple[int, Opcode]] = []
        self.batches = 0
        self.refusal: CrailError | None = None
        self.gone: list[Peer] = []

    def welcome(self, peer: Peer) -> Welcome:
        if self.refusal is not None:
            raise self.refusal
        self.peers.append(peer)
        return Welcome(session_is_new=len(self.peers) == 1, lease_ms=5_000)

    def payload_target(
        self, peer: Peer, opcode: Opcode, request: Any, byte_count: int
    ) -> memoryview:
        return self.memory[request.offset : request.offset + byte_count]

    def request(
        self,
        peer: Peer,
        opcode: Opcode,
        request_id: int,
        request: Any,
        payload: memoryview | None,
    ) -> None:
        self.requests.append((request_id, opcode))
        if opcode in self.answers:
            self.answers[opcode](peer, request_id, request, payload)
        elif isinstance(request, Lookup):
            peer.reply(request_id, attributes(request.parent))
        elif isinstance(request, ReadBlocks):
            end = request.offset + request.byte_count
            peer.reply(request_id, Empty(), payload=self.memory[request.offset : end])
        else:
            peer.reply(request_id, Empty())

    def batch_done(self) -> None:
        self.batches += 1

    def disconnected(self, peer: Peer) -> None:
        self.peers.remove(peer)
        self.gone.append(peer)


def never(peer: Peer, request_id: int, request: Message, payload: memoryview | None) -> None:
    """An answer that does not come."""


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, *addresses: str, credentials: Credentials = CREDENTIALS, epoch: int = 1
) -> AsyncIterator[list[str]]:
    async with trio.open_nursery() as nursery:
        bound: list[str] = await nursery.start(
            functools.partial(
                serve,
                addresses or ("127.0.0.1:0",),
                handler,
                credentials,
                epoch=epoch,
                operations=OPERATIONS,
            )
        )
        yield bound
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def connected_client(
    address: str, *, client_id: int = 7, credentials: Credentials = CREDENTIALS, **hooks: Any
) -> AsyncIterator[RpcClient]:
    client = RpcClient(address, credentials, role=Role.CLIENT, client_id=client_id, **hooks)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


def both_kinds(tmp_path: Path) -> tuple[str, str]:
    return f"unix:{tmp_path}/socket", "127.0.0.1:0"


class RawPeer:
    """A connection on which a test says every byte itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection()

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def receive(self) -> bytes:
        """What comes next; empty at the end of the stream, however it ended."""
        while True:
            try:
                return self.sock.recv(65_536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
            except ConnectionError:
                return b""

    async def next_frame(self) -> Frame:
        while (event := self.connection.next_event()) is NEED_DATA:
            data = await self.receive()
            if not data:
                raise EOFError
            self.connection.receive_data(data)
        assert isinstance(event, Frame)
        return event

    async def is_cut_off(self) -> bool:
        """Waits for the end of the stream."""
        while await self.receive():
            pass
        return True

    async def handshake(self, credentials: Credentials = CREDENTIALS, client_id: int = 9) -> None:
        side = ConnectingSide(credentials, Role.CLIENT, client_id)
        await self.send(request_frame(Opcode.HELLO, 0, side.hello))
        challenge: Any = message_of(await self.next_frame(), Opcode.HELLO)
        await self.send(request_frame(Opcode.PROOF, 0, side.answer(challenge)))
        message_of(await self.next_frame(), Opcode.PROOF)
        self.connection.authenticated()


def message_of(frame: Frame, opcode: Opcode) -> Message:
    if frame.flags & ERROR:
        raise decode_error(frame.code, frame.body)
    return decode_reply(opcode, frame.body)


@contextlib.asynccontextmanager
async def raw_peer(address: str, *, handshake: bool = False) -> AsyncIterator[RawPeer]:
    sock = await connect_socket(parse_address(address))
    with sock:
        peer = RawPeer(sock)
        if handshake:
            await peer.handshake()
        yield peer


async def until(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    """Lets other tasks run until ``condition`` holds."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 (the condition is nobody's event)
            await trio.sleep(0.001)


def request_ids(handler: Handler) -> Sequence[int]:
    return [request_id for request_id, _ in handler.requests]
