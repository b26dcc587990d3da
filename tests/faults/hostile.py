"""Peers that do not keep to the protocol, over blocking sockets."""

from __future__ import annotations

import random
import socket
import time
from typing import Any, NamedTuple

import msgspec

from crailfs.config import Credentials
from crailfs.errors import CrailError
from crailfs.wire.codec import decode_error, decode_reply, request_frame
from crailfs.wire.connection import NEED_DATA, Connection, Frame
from crailfs.wire.handshake import ConnectingSide
from crailfs.wire.header import ERROR, PUSH, pack_header
from crailfs.wire.messages import Challenge, Message, Opcode, Role

ANSWER_TIMEOUT_S = 10.0


class HostilePeer:
    """A connection on which a test says every byte itself."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            place: Any = address.removeprefix("unix:")
        else:
            self.sock = socket.socket()
            host, _, port = address.rpartition(":")
            place = host, int(port)
        self.sock.settimeout(ANSWER_TIMEOUT_S)
        self.sock.connect(place)
        self._connection = Connection()
        self._next_request_id = int(time.time() * 1000)
        """Greater than any of an earlier connection of the same client."""

    def __enter__(self) -> HostilePeer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def handshake(self, credentials: Credentials, role: Role, client_id: int) -> HostilePeer:
        """Raises the server's refusal."""
        side = ConnectingSide(credentials, role, client_id)
        self.sock.sendall(request_frame(Opcode.HELLO, 0, side.hello))
        challenge = self._answer(Opcode.HELLO)
        assert isinstance(challenge, Challenge)
        self.sock.sendall(request_frame(Opcode.PROOF, 0, side.answer(challenge)))
        self._answer(Opcode.PROOF)
        self._connection.authenticated()
        return self

    def call(self, opcode: Opcode, request: Message, payload: bytes = b"") -> Message:
        """The reply. Raises the server's error, and ``EOFError`` when it ends the connection."""
        return self.call_raw(opcode, msgspec.msgpack.encode(request), payload)

    def call_raw(self, opcode: Opcode, body: bytes, payload: bytes = b"") -> Message:
        """As ``call``, with any bytes as the body."""
        self._next_request_id += 1
        header = pack_header(0, opcode, self._next_request_id, len(body), len(payload))
        try:
            self.sock.sendall(header + body + payload)
        except ConnectionError:
            raise EOFError from None
        return self._answer(opcode)

    def is_cut_off(self) -> bool:
        """Waits for the end of the stream."""
        try:
            while self.sock.recv(65_536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            pass
        return True

    def _answer(self, opcode: Opcode) -> Message:
        frame = self._next_frame()
        while frame.flags & PUSH:
            frame = self._next_frame()
        if frame.flags & ERROR:
            raise decode_error(frame.code, frame.body)
        return decode_reply(opcode, frame.body)

    def _next_frame(self) -> Frame:
        while True:
            event = self._connection.next_event()
            if isinstance(event, Frame):
                if event.payload_bytes:
                    self._connection.receive_payload(None)
                return event
            if event is NEED_DATA:
                space = self._connection.payload_space()
                try:
                    if space is not None:
                        count = self.sock.recv_into(space)
                        self._connection.payload_written(count)
                    else:
                        data = self.sock.recv(self._connection.receive_max_bytes)
                        count = len(data)
                        self._connection.receive_data(data)
                except ConnectionError:
                    count = 0
                if not count:
                    raise EOFError


class Outcome(NamedTuple):
    replies: int
    errors: int
    cut_off: int


_INTEGERS = (
    0, -1, -(1 << 63), (1 << 31) - 1, (1 << 32) - 1, (1 << 36) + 1, (1 << 48) - 1, 1 << 48,
    (1 << 62), (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
_ANYTHING: tuple[Any, ...] = (None, True, 1.5, float("nan"), b"", b"\0" * 300, "text", [], {}, [[]])


def mutated(request: Message, choose: random.Random) -> bytes:
    """The body of ``request`` with one to three of its parts, at any depth, replaced."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(request))
    for _ in range(choose.randrange(1, 4)):
        fields = _change(fields, choose)
    body = bytearray(msgspec.msgpack.encode(fields))
    if choose.random() < 0.2:
        body[choose.randrange(len(body))] = choose.randrange(256)
    if choose.random() < 0.1:
        del body[choose.randrange(len(body)) :]
    return bytes(body)


def _change(value: Any, choose: random.Random) -> Any:
    if isinstance(value, list) and value and choose.random() < 0.9:
        at = choose.randrange(len(value))
        action = choose.random()
        if action < 0.05:
            return value[:at] + value[at + 1 :]
        if action < 0.1:
            return value + value * choose.choice((1, 100))
        return [*value[:at], _change(value[at], choose), *value[at + 1 :]]
    if choose.random() < 0.2:
        return choose.choice(_ANYTHING)
    if isinstance(value, int) and not isinstance(value, bool):
        return choose.choice(_INTEGERS)
    if isinstance(value, bytes):
        return choose.choice((b"", b".", b"..", b"a/b", b"\0", b"\xff" * 256, value * 100))
    if isinstance(value, str):
        return choose.choice(("", "\0", "x" * 10_000))
    return choose.choice(_ANYTHING)


def send_mutations(
    address: str,
    credentials: Credentials,
    samples: dict[Opcode, Message],
    *,
    role: Role,
    client_id: int,
    count: int,
    choose: random.Random,
) -> Outcome:
    """Mutations of ``samples`` one after the other; each must be answered, or end the connection,
    which is then made anew."""
    replies = errors = cut_off = 0
    peer = HostilePeer(address).handshake(credentials, role, client_id)
    try:
        for _ in range(count):
            opcode = choose.choice(list(samples))
            payload = bytes(100) if opcode is Opcode.WRITE_BLOCKS else b""
            try:
                peer.call_raw(opcode, mutated(samples[opcode], choose), payload)
                replies += 1
            except CrailError:
                errors += 1
            except EOFError:
                cut_off += 1
                peer.sock.close()
                peer = HostilePeer(address).handshake(credentials, role, client_id)
    finally:
        peer.sock.close()
    return Outcome(replies, errors, cut_off)
