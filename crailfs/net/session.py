"""What happens on one connection of a client: calls go out, replies and pushes come in."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from crailfs.errors import CrailError, InternalError, NotSupportedError, ProtocolError
from crailfs.limits import REQUESTS_IN_FLIGHT_MAX
from crailfs.net.link import Link, close_descriptors
from crailfs.net.waiting import Spinner
from crailfs.wire.codec import (
    decode_error,
    decode_reply,
    decode_request,
    error_frame,
    opcode_of,
    reply_frame,
)
from crailfs.wire.connection import NEED_DATA, PAYLOAD_RECEIVED, Frame
from crailfs.wire.header import ERROR, PUSH, REPLY
from crailfs.wire.messages import Message, Opcode

log = logging.getLogger(__name__)

IN_PLACE_MAX_S: Final = 0.002
"""How long a caller may keep other tasks waiting while its payload moves without a pause."""

PushHandler = Callable[[Opcode, Message], Awaitable[Message]]


class Call:
    """One request that waits for its answer; it outlives connections."""

    __slots__ = (
        "answer", "done", "failure", "fds", "frame", "into", "is_done", "opcode", "payload",
        "request_id", "started_s",
    )  # fmt: skip

    def __init__(
        self,
        opcode: Opcode,
        request_id: int,
        frame: bytes,
        payload: list[memoryview],
        into: memoryview | None,
        fds: list[int] | None,
    ) -> None:
        self.opcode = opcode
        self.request_id = request_id
        self.frame = frame
        self.payload = payload
        self.into = into
        self.fds = fds
        self.started_s = time.monotonic()
        self.answer: Message | None = None
        self.failure: CrailError | None = None
        self.is_done = False
        self.done: trio.Event | None = None
        """Made by a caller that has to sleep."""

    def finish(self, answer: Message | None, failure: CrailError | None) -> None:
        self.answer, self.failure = answer, failure
        self.is_done = True
        if self.done is not None:
            self.done.set()


class Session:
    """``run`` serves until the connection ends; everything else is synchronous."""

    def __init__(
        self,
        link: Link,
        nursery: trio.Nursery,
        pending: dict[int, Call],
        answered: Callable[[Call], None],
        on_push: PushHandler | None,
    ) -> None:
        self.failure: str | None = None
        """Why the connection is no longer used."""
        self.last_received_s = time.monotonic()
        self._link = link
        self._nursery = nursery
        self._pending = pending
        self._answered = answered
        """Told of each call that has its answer."""
        self._on_push = on_push
        self._pushes_running = 0
        self._filling: tuple[Call, Frame] | None = None
        """The reply whose payload is arriving."""
        self._has_output = trio.Event()
        self._spinner = Spinner(link.sock.fileno())

    async def run(self) -> None:
        """Ends only by cancellation: ``fail`` cancels the nursery."""
        self._nursery.start_soon(self._send_forever)
        self._take_frames_safely()  # what came right behind the handshake
        while True:
            await trio.lowlevel.wait_readable(self._link.sock)
            self.receive()

    def fail(self, reason: str) -> None:
        """The connection is not to be used any more; calls without an answer stay pending."""
        if self.failure is None:
            self.failure = reason
            self._filling = None
            self._link.connection.discard_payload()
            self._nursery.cancel_scope.cancel()

    # --- sending --------------------------------------------------------------------------------

    def send(self, call: Call) -> None:
        if call.fds is not None:
            close_descriptors(call.fds)
            self._link.received_fds = call.fds
        self._send(call.frame, call.payload)

    def _send(self, frame: bytes, payload: list[memoryview]) -> None:
        if self.failure is not None:
            return
        queue = self._link.queue
        queue.append(frame, payload)
        self._flush()

    def _flush(self) -> None:
        try:
            drained = self._link.queue.flush()
        except OSError as error:
            self.fail(str(error))
            return
        if not drained:
            self._has_output.set()

    async def _send_forever(self) -> None:
        while True:
            await self._has_output.wait()
            await trio.lowlevel.wait_writable(self._link.sock)
            self._flush()
            if self._link.queue.byte_count == 0:
                self._has_output = trio.Event()

    def abandon(self, call: Call) -> None:
        """The caller has gone: its buffers are neither read from nor written to any more."""
        if call.payload:
            self._link.queue.detach(call.payload[0])
        if self._filling is not None and self._filling[0] is call:
            self._filling = None
            self._link.connection.discard_payload()
        if call.fds is not None:
            self._link.received_fds = None

    # --- receiving ------------------------------------------------------------------------------

    def wait_in_place(self, call: Call) -> None:
        """Takes the answer without going through the scheduler, if it comes soon."""
        end_s = time.monotonic() + IN_PLACE_MAX_S
        while not call.is_done and self.failure is None and self._spinner.wait():
            self.receive()
            if self._link.queue.byte_count:
                self._flush()
            if time.monotonic() > end_s:
                return

    def receive(self) -> None:
        """Takes what one read of the socket gives and hands it on."""
        try:
            if not self._link.receive():
                return
        except OSError as error:
            self.fail(str(error))
            return
        self.last_received_s = time.monotonic()
        self._take_frames_safely()

    def _take_frames_safely(self) -> None:
        try:
            self._take_frames()
        except CrailError as error:
            log.warning("connection given up: %s", error.message)
            self.fail(error.message)

    def _take_frames(self) -> None:
        connection = self._link.connection
        while self.failure is None and (event := connection.next_event()) is not NEED_DATA:
            if event is PAYLOAD_RECEIVED:
                if self._filling is not None:
                    call, frame = self._filling
                    self._filling = None
                    self._finish(call, frame)
            elif event.flags & REPLY:
                self._reply(event)
            elif event.flags == PUSH:
                self._push(event)
            else:
                raise ProtocolError(f"frame with flags 0x{event.flags:02x} from a server")

    def _reply(self, frame: Frame) -> None:
        call = self._pending.get(frame.request_id)
        if not frame.payload_bytes:
            if call is not None:
                self._finish(call, frame)
            return
        if call is not None and call.into is not None and call.into.nbytes == frame.payload_bytes:
            self._link.connection.receive_payload(call.into)
            self._filling = call, frame
            return
        self._link.connection.receive_payload(None)
        if call is not None:
            expected = 0 if call.into is None else call.into.nbytes
            self._answer(
                call,
                None,
                ProtocolError(
                    f"{call.opcode.name} was answered with {frame.payload_bytes} bytes instead of"
                    f" {expected}"
                ),
            )

    def _finish(self, call: Call, frame: Frame) -> None:
        answer: Message | None = None
        failure: CrailError | None = None
        try:
            if frame.flags & ERROR:
                failure = decode_error(frame.code, frame.body)
            else:
                answer = decode_reply(call.opcode, frame.body)
                if call.into is not None and call.into.nbytes != frame.payload_bytes:
                    raise ProtocolError(f"{call.opcode.name} was answered without its payload")
        except ProtocolError as error:
            answer, failure = None, error
        self._answer(call, answer, failure)

    def _answer(self, call: Call, answer: Message | None, failure: CrailError | None) -> None:
        if call.fds is not None:
            self._link.received_fds = None
        call.finish(answer, failure)
        self._answered(call)

    # --- pushes ---------------------------------------------------------------------------------

    def _push(self, frame: Frame) -> None:
        if frame.payload_bytes or self._pushes_running >= REQUESTS_IN_FLIGHT_MAX:
            raise ProtocolError("the server pushed a payload, or more than may be in flight")
        self._pushes_running += 1
        self._nursery.start_soon(self._answer_push, frame)

    async def _answer_push(self, frame: Frame) -> None:
        # Callers whose replies came before this push run first: what they remember of those
        # replies is there when the push says that it has changed.
        await trio.lowlevel.checkpoint()
        try:
            reply = reply_frame(frame.request_id, await self._carry_out(frame), flags=PUSH)
        except CrailError as error:
            reply = error_frame(frame.request_id, error, flags=PUSH)
        self._pushes_running -= 1
        self._send(reply, [])

    async def _carry_out(self, frame: Frame) -> Message:
        opcode = opcode_of(frame.code)
        if opcode is None or self._on_push is None:
            raise NotSupportedError(f"this client does not carry out operation {frame.code}")
        request = decode_request(opcode, frame.body)
        try:
            return await self._on_push(opcode, request)
        except CrailError:
            raise
        except Exception as error:
            log.exception("%s from the server failed", opcode.name)
            raise InternalError(
                f"{opcode.name} failed in the client; its log has the trace"
            ) from error
