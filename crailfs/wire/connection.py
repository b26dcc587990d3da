"""The receiving side of a connection as a state machine: bytes in, events out, no I/O.

Usage: feed what the socket gave to ``receive_data``, then take ``next_event`` until it says
``NEED_DATA``. A frame whose ``payload_bytes`` is not zero must be answered with
``receive_payload`` before the next event is asked for; from then on ``payload_space`` is the
memory that the next bytes belong into, so that the caller can let the kernel write them there::

    space = connection.payload_space()
    if space is not None:
        connection.payload_written(sock.recv_into(space))
    else:
        connection.receive_data(sock.recv(connection.receive_max_bytes))
    while (event := connection.next_event()) is not NEED_DATA:
        ...

A connection starts with the small limits of a peer that has proved nothing; ``authenticated``
raises them. What is held in memory is never more than one body within the limit in force and one
``receive_max_bytes``.
"""

from __future__ import annotations

import enum
from typing import Final, Literal, NamedTuple

from crailfs.errors import ProtocolError
from crailfs.limits import (
    BODY_MAX_BYTES,
    HANDSHAKE_BODY_MAX_BYTES,
    HEADER_BYTES,
    PAYLOAD_MAX_BYTES,
)
from crailfs.units import KIB
from crailfs.wire.header import MAGIC_BYTES, unpack_header

RECEIVE_BYTES: Final = 64 * KIB
"""How much is read at once after the handshake; the part of a payload that arrives with its frame
is copied once, so this is also the most that is ever copied of one."""


class Signal(enum.Enum):
    NEED_DATA = enum.auto()
    """Nothing more until ``receive_data`` or ``payload_written`` brings bytes."""
    PAYLOAD_RECEIVED = enum.auto()
    """The payload of the last frame is complete in its target (or dropped)."""


NEED_DATA: Final = Signal.NEED_DATA
PAYLOAD_RECEIVED: Final = Signal.PAYLOAD_RECEIVED


class Frame(NamedTuple):
    flags: int
    code: int
    """Opcode of a request, status of a reply."""
    request_id: int
    body: bytes | bytearray
    payload_bytes: int
    """If not 0, the frame is complete only at the next ``PAYLOAD_RECEIVED``."""


Event = Frame | Literal[Signal.NEED_DATA, Signal.PAYLOAD_RECEIVED]


class _State(enum.Enum):
    FRAME = enum.auto()
    """A header and body are expected, or arriving."""
    ANNOUNCED = enum.auto()
    """The caller has a frame with a payload and has not yet said where it goes."""
    PAYLOAD = enum.auto()


class Connection:
    """Cuts one peer's byte stream into frames. Errors are final: drop the connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._state = _State.FRAME
        self._body_max_bytes = HANDSHAKE_BODY_MAX_BYTES
        self._payload_max_bytes = 0
        self._payload_left = 0
        """Bytes of the payload that have not come yet."""
        self._target: memoryview | None = None
        """Where they go; ``None``: they are dropped."""
        self.receive_max_bytes = HEADER_BYTES + HANDSHAKE_BODY_MAX_BYTES
        """The most that the caller may read from its socket for one ``receive_data``."""
        self.frames_completed = 0
        """Frames that events have told of to their end, payload included."""

    def authenticated(self) -> None:
        """The peer knows the cluster's secret: the full limits apply from now on."""
        self._body_max_bytes = BODY_MAX_BYTES
        self._payload_max_bytes = PAYLOAD_MAX_BYTES
        self.receive_max_bytes = RECEIVE_BYTES

    @property
    def mid_frame(self) -> bool:
        """Whether bytes have come that no event has told of yet, or a payload is arriving."""
        return bool(self._buffer) or self._state is not _State.FRAME

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next_event(self) -> Event:
        """Raises ``ProtocolError`` or ``VersionError`` for what is not a frame within limits."""
        if self._state is not _State.FRAME:
            assert self._state is _State.PAYLOAD, "receive_payload was not called"
            return self._next_payload_event()
        buffer = self._buffer
        if not buffer:
            return NEED_DATA
        if len(buffer) < HEADER_BYTES:
            if not MAGIC_BYTES.startswith(buffer[:4]):
                raise ProtocolError(
                    f"frame begins with {bytes(buffer[:4])!r} instead of {MAGIC_BYTES!r}: the peer"
                    " does not speak CrailFS's protocol; check the address"
                )
            return NEED_DATA
        flags, code, request_id, body_bytes, payload_bytes = unpack_header(buffer)
        if body_bytes > self._body_max_bytes or payload_bytes > self._payload_max_bytes:
            raise ProtocolError(
                f"frame announces a body of {body_bytes} and a payload of {payload_bytes} bytes;"
                f" at most {self._body_max_bytes} and {self._payload_max_bytes} are taken here"
            )
        end = HEADER_BYTES + body_bytes
        if len(buffer) < end:
            return NEED_DATA
        body = buffer[HEADER_BYTES:end]
        del buffer[:end]
        if payload_bytes:
            self._payload_left = payload_bytes
            self._state = _State.ANNOUNCED
        else:
            self.frames_completed += 1
        return Frame(flags, code, request_id, body, payload_bytes)

    def receive_payload(self, target: memoryview | None) -> None:
        """Where the announced payload goes: a target exactly as long, or ``None`` to drop it."""
        assert self._state is _State.ANNOUNCED, "no payload has been announced"
        if target is not None and target.nbytes != self._payload_left:
            raise ValueError(f"payload of {self._payload_left} bytes, target of {target.nbytes}")
        self._target = target
        self._state = _State.PAYLOAD

    def discard_payload(self) -> None:
        """What is still to come of the current payload is dropped; its target is let go."""
        self._target = None

    def payload_space(self) -> memoryview | None:
        """Where the next bytes from the socket belong; ``None``: hand them to ``receive_data``."""
        return None if self._buffer else self._target

    def payload_written(self, byte_count: int) -> None:
        """The first ``byte_count`` bytes of ``payload_space`` have been filled."""
        assert self._target is not None and byte_count <= self._payload_left
        self._payload_left -= byte_count
        self._target = self._target[byte_count:] if self._payload_left else None

    def _next_payload_event(self) -> Event:
        buffered = min(len(self._buffer), self._payload_left)
        if buffered:
            if self._target is not None:
                self._target[:buffered] = self._buffer[:buffered]
                self._target = self._target[buffered:]
            del self._buffer[:buffered]
            self._payload_left -= buffered
        if self._payload_left:
            return NEED_DATA
        self._target = None
        self._state = _State.FRAME
        self.frames_completed += 1
        return PAYLOAD_RECEIVED
