"""What a server's handlers are, and one connection as they see it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from crailfs.errors import CrailError, ProtocolError, UnavailableError
from crailfs.limits import REQUESTS_IN_FLIGHT_MAX
from crailfs.net.sending import Buffer, SendQueue, byte_views
from crailfs.units import MIB
from crailfs.wire.codec import decode_error, decode_reply, error_frame, reply_frame, request_frame
from crailfs.wire.connection import Connection, Frame
from crailfs.wire.handshake import AcceptingSide
from crailfs.wire.header import ERROR, PUSH
from crailfs.wire.messages import Message, Opcode, Role, Welcome

OUTGOING_PAUSE_BYTES: Final = 1 * MIB
"""A peer with this much waiting to be sent to it is not read from."""


class Handler(Protocol):
    """What a server does. All methods are synchronous and called from one task."""

    def welcome(self, peer: Peer) -> Welcome:
        """A peer has proved that it knows the secret. Raise a ``CrailError`` to refuse it. It can
        be pushed to only after this has returned."""
        ...

    def payload_target(
        self, peer: Peer, opcode: Opcode, request: Message, byte_count: int
    ) -> memoryview:
        """Where the payload of this request goes: exactly ``byte_count`` bytes, received straight
        into it. A ``CrailError`` refuses the request; its payload is dropped."""
        ...

    def request(
        self,
        peer: Peer,
        opcode: Opcode,
        request_id: int,
        request: Message,
        payload: memoryview | None,
    ) -> None:
        """Answer now or later with ``peer.reply`` or ``peer.reply_error``; a ``CrailError``
        raised here is the answer."""
        ...

    def batch_done(self) -> None:
        """All that had arrived has been handed over: replies leave when this returns."""
        ...

    def disconnected(self, peer: Peer) -> None:
        """A peer that was welcome is gone. Its unanswered requests need no answer."""
        ...


class Output(Protocol):
    """What a peer asks of the server that it belongs to."""

    def request_answered(self, peer: Peer) -> None: ...
    def push_added(self, peer: Peer) -> None: ...
    def close_asked(self, peer: Peer) -> None: ...


class AwaitedPayload(NamedTuple):
    """A request whose payload is still arriving."""

    request_id: int
    opcode: Opcode | None
    request: Message | None
    target: memoryview | None
    error: CrailError | None
    """Why it is refused: said when its payload has been dropped."""


class Peer:
    """One authenticated connection. Used from the server's own thread only.

    A reply or push to a peer that is gone does nothing: its end was told by
    ``Handler.disconnected``, and each push without an answer gets ``UnavailableError``.
    """

    client_id: int
    role: Role
    is_local: bool
    """Whether it came through a Unix socket: file descriptors can be passed to it."""
    description: str
    """For log lines: address or process, role and client id."""

    def __init__(
        self,
        output: Output,
        sock: socket.socket,
        handshake: AcceptingSide,
        *,
        is_local: bool,
        description: str,
    ) -> None:
        self.client_id = 0
        self.role = Role.CLIENT
        self.is_local = is_local
        self.description = description
        # The rest is the server's.
        self.sock = sock
        self.connection = Connection()
        self.queue = SendQueue(sock)
        self.handshake: AcceptingSide | None = handshake
        """``None`` once the peer is authenticated and welcome."""
        self.in_flight: set[int] = set()
        """Ids of requests that were handed over and not answered."""
        self.awaited: AwaitedPayload | None = None
        self.paused = False
        """Frames may be waiting in ``connection`` that were not looked at, because of a limit."""
        self.closing: str | None = None
        """Why this side ends the connection."""
        self.epoll_mask = 0
        self.connected_s = time.monotonic()
        self.frames_seen = 0
        self.frame_started_s: float | None = None
        """When the frame that is arriving began; ``None``: none is."""
        self.send_stalled_s: float | None = None
        """Since when the socket has taken nothing though something waits for it."""
        self._output = output
        self._pushes: dict[int, tuple[Opcode, Callable[[Message | CrailError], None]]] = {}
        self._next_push_id = 1
        self._gone = False

    def __repr__(self) -> str:
        return f"<Peer {self.description}>"

    def reply(
        self,
        request_id: int,
        message: Message,
        *,
        payload: Buffer | Sequence[Buffer] = (),
        fds: Sequence[int] = (),
    ) -> None:
        """Answers a request, once.

        ``payload`` must not change before it is sent; it is not copied. ``fds`` (local peers
        only) are duplicated: the caller keeps its own. Raises ``InvalidError`` if the message or
        payload is larger than a frame may be; the request can still be answered then.
        """
        views = byte_views(payload) if payload else ()
        if fds and not self.is_local:
            raise ValueError(f"file descriptors cannot be passed to {self.description}")
        frame = reply_frame(request_id, message, payload_bytes=sum(view.nbytes for view in views))
        if self.closing is not None:
            return
        self.in_flight.remove(request_id)
        if fds:
            self.queue.append_with_descriptors(frame, fds)
        else:
            self.queue.append(frame, views)
        self._output.request_answered(self)

    def reply_error(self, request_id: int, error: CrailError) -> None:
        """Answers a request with an error, once."""
        if self.closing is not None:
            return
        self.in_flight.remove(request_id)
        self.queue.append(error_frame(request_id, error))
        self._output.request_answered(self)

    def push(
        self, opcode: Opcode, message: Message, on_reply: Callable[[Message | CrailError], None]
    ) -> None:
        """Sends a request to the client. ``on_reply`` is called exactly once: with the reply, with
        the client's error, or with ``UnavailableError`` when the connection ends (at once if it
        has ended already)."""
        if self._gone:
            on_reply(UnavailableError(f"{self.description} is gone: {self.closing}"))
            return
        push_id = self._next_push_id
        frame = request_frame(opcode, push_id, message, flags=PUSH)
        self._next_push_id += 1
        self._pushes[push_id] = opcode, on_reply
        if self.closing is not None:
            return
        if len(self._pushes) > REQUESTS_IN_FLIGHT_MAX:
            self.close(f"it left {REQUESTS_IN_FLIGHT_MAX} pushes unanswered")
            return
        self.queue.append(frame)
        self._output.push_added(self)

    def close(self, reason: str) -> None:
        """Sends what the socket takes at once of the replies so far, then ends the connection.

        From now on nothing is read from it: no further request, and nothing more into the target
        of a payload that was arriving.
        """
        if self.closing is None:
            self.closing = reason
            self._let_go_of_payload()
            self._output.close_asked(self)

    @property
    def saturated(self) -> bool:
        """Whether no more may be taken from this peer just now."""
        return (
            len(self.in_flight) >= REQUESTS_IN_FLIGHT_MAX
            or self.queue.byte_count >= OUTGOING_PAUSE_BYTES
        )

    def push_replied(self, frame: Frame) -> None:
        """Raises ``ProtocolError`` if the frame answers nothing that was asked."""
        waiting = self._pushes.pop(frame.request_id, None)
        if waiting is None or frame.payload_bytes:
            raise ProtocolError(f"the peer answered push {frame.request_id}, which is not open")
        opcode, on_reply = waiting
        answer: Message | CrailError
        try:
            if frame.flags & ERROR:
                answer = decode_error(frame.code, frame.body)
            else:
                answer = decode_reply(opcode, frame.body)
        except ProtocolError as error:
            on_reply(error)
            raise
        on_reply(answer)

    def let_go(self) -> None:
        """Closes the socket and refers to no buffer of the handler's any more."""
        self._let_go_of_payload()
        self.queue.close()
        self.sock.close()

    def _let_go_of_payload(self) -> None:
        self.connection.discard_payload()
        self.awaited = None

    def fail_pushes(self, reason: str) -> None:
        """The connection has ended: nothing more will be answered."""
        self._gone = True
        while self._pushes:
            _, (_, on_reply) = self._pushes.popitem()
            on_reply(UnavailableError(f"{self.description} is gone: {reason}"))
