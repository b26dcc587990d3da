"""The connecting side of all RPC: one connection that is made again whenever it breaks.

Request ids grow over the client's whole life. A request that has no answer when the connection
breaks is sent again, once a connection, with the same id; the server answers a mutating one that it
has already carried out from memory. So each request takes effect at most once, and its caller gets
the answer, the server's error, or ``UnavailableError`` at the deadline.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from crailfs.config import Credentials
from crailfs.errors import CrailError, UnavailableError
from crailfs.limits import (
    CONNECT_TIMEOUT_MS,
    OPERATION_TIMEOUT_MS,
    RECONNECT_DELAY_MAX_MS,
    RECONNECT_DELAY_MIN_MS,
    REQUESTS_IN_FLIGHT_MAX,
)
from crailfs.net.address import connect_socket, parse_address
from crailfs.net.link import Link, close_descriptors
from crailfs.net.sending import Buffer, byte_views
from crailfs.net.session import Call, PushHandler, Session
from crailfs.wire.codec import request_frame
from crailfs.wire.handshake import check_credentials
from crailfs.wire.messages import Challenge, Message, Opcode, Role, Welcome

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_S: Final = 0.002
"""How long a caller whose replies come at once keeps the other tasks waiting."""
RECONNECT_DELAY_GROWTH: Final = 1.5
"""A server that starts is found at most half as late as it took to start."""
LOCATE_TIMEOUT_S: Final = 1.0
STABLE_CONNECTION_S: Final = 1.0
"""After a connection that lived this long the next attempt begins with the shortest delay."""


class RpcClient:
    """Calls operations of one server. ``run`` must be running; used from one trio thread."""

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        role: Role,
        client_id: int,
        on_push: PushHandler | None = None,
        on_connected: Callable[[Welcome, Challenge], Awaitable[None]] | None = None,
        on_disconnected: Callable[[], None] | None = None,
        locate: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """``address`` is ``unix:/path`` or ``host:port``. Raises ``ConfigurationError``.

        ``on_push`` answers requests of the server, each in a task of its own; replies that came
        before a push have been returned to their callers when it begins. ``on_connected`` runs
        after each handshake, beside the calls that are sent again; a ``CrailError`` from it ends
        that connection. ``on_disconnected`` is called when a connection that was made has ended.
        ``locate`` is asked for the server's address after each attempt that failed: a server that
        comes back may be somewhere else. A ``CrailError`` from it leaves the address as it is.
        """
        check_credentials(credentials, cluster_id_required=False)
        self._address = parse_address(address)
        self._credentials = credentials
        self._role = role
        self._client_id = client_id
        self._on_push = on_push
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._locate = locate
        self._session: Session | None = None
        self._pending: dict[int, Call] = {}
        """Calls without an answer, by request id, in the order of their ids."""
        self._room = trio.lowlevel.ParkingLot()
        """Callers that wait because too many calls are in flight."""
        self._settled = trio.lowlevel.ParkingLot()
        self._next_request_id = 1
        self._last_failure = "no connection has been tried"
        self._refusal: CrailError | None = None
        """Why the server does not want this client; ``None``: it does, or has not been asked."""
        self._checkpoint_s = 0.0
        self._descriptor_calls = trio.Lock()

    @property
    def connected(self) -> bool:
        return self._session is not None and self._session.failure is None

    @property
    def completed_below(self) -> int:
        """All requests with a lower id have been answered or given up."""
        return next(iter(self._pending), self._next_request_id)

    async def call(
        self,
        opcode: Opcode,
        request: Message,
        *,
        payload: Buffer | None = None,
        into: memoryview | None = None,
        deadline_ms: int = OPERATION_TIMEOUT_MS,
    ) -> Message:
        """The server's reply; its payload is received into ``into``, which it fills exactly.

        ``payload`` must not change and ``into`` not be used before this returns or raises.
        Raises the server's ``CrailError``, or ``UnavailableError`` at the deadline.
        """
        return await self._perform(opcode, request, payload, into, None, deadline_ms)

    async def call_with_fds(
        self, opcode: Opcode, request: Message, *, deadline_ms: int = OPERATION_TIMEOUT_MS
    ) -> tuple[Message, list[int]]:
        """As ``call``, with the file descriptors that came with the reply; the caller closes
        them."""
        fds: list[int] = []
        with trio.move_on_after(deadline_ms / 1000):
            # Descriptors arrive without a request id: one such call at a time.
            async with self._descriptor_calls:
                try:
                    return await self._perform(opcode, request, None, None, fds, deadline_ms), fds
                except BaseException:
                    close_descriptors(fds)
                    raise
        raise self._unavailable(opcode, deadline_ms)

    async def _perform(
        self,
        opcode: Opcode,
        request: Message,
        payload: Buffer | None,
        into: memoryview | None,
        fds: list[int] | None,
        deadline_ms: int,
    ) -> Message:
        now = time.monotonic()
        if now >= self._checkpoint_s:
            await trio.lowlevel.checkpoint()
            self._checkpoint_s = now + CHECKPOINT_INTERVAL_S
        if len(self._pending) >= REQUESTS_IN_FLIGHT_MAX:
            await self._wait_for_room(opcode, deadline_ms)
        if self._refusal is not None:
            raise self._refusal_again()
        request_id = self._next_request_id
        views = byte_views(payload) if payload is not None else []
        frame = request_frame(
            opcode, request_id, request, payload_bytes=views[0].nbytes if views else 0
        )
        self._next_request_id += 1
        call = Call(opcode, request_id, frame, views, into.cast("B") if into else None, fds)
        self._pending[request_id] = call
        try:
            session = self._session
            if session is not None:
                session.send(call)
                if len(self._pending) == 1:
                    session.wait_in_place(call)
            if not call.is_done:
                call.done = trio.Event()
                with trio.move_on_after(call.started_s + deadline_ms / 1000 - time.monotonic()):
                    await call.done.wait()
            if not call.is_done:
                self._drop_silent_connection(call)
                raise self._unavailable(opcode, deadline_ms)
        finally:
            if not call.is_done:
                self._abandon(call)
        if call.failure is not None:
            raise call.failure
        assert call.answer is not None
        return call.answer

    async def _wait_for_room(self, opcode: Opcode, deadline_ms: int) -> None:
        with trio.move_on_after(deadline_ms / 1000):
            while len(self._pending) >= REQUESTS_IN_FLIGHT_MAX:
                await self._room.park()
            return
        raise self._unavailable(opcode, deadline_ms)

    def _answered(self, call: Call) -> None:
        del self._pending[call.request_id]
        if self._room:
            self._room.unpark()
        if not self._pending:
            self._settled.unpark_all()

    async def settle(self) -> None:
        """Wait until all calls have been answered or given up."""
        while self._pending:
            await self._settled.park()

    def _abandon(self, call: Call) -> None:
        self._answered(call)
        if self._session is not None:
            self._session.abandon(call)

    def _drop_silent_connection(self, call: Call) -> None:
        """A server that has said nothing since the call began may be beyond reach: try anew."""
        session = self._session
        if session is not None and session.last_received_s < call.started_s:
            session.fail(f"nothing came from {self._address} for a whole deadline")

    def _unavailable(self, opcode: Opcode, deadline_ms: int) -> UnavailableError:
        state = "it is connected" if self.connected else self._last_failure
        return UnavailableError(
            f"{self._address} did not answer {opcode.name} within {deadline_ms} ms ({state}):"
            " check that the server runs"
        )

    # --- the connection -------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the connection until cancelled, making it again as often as needed.

        Calls that are open then, and later ones, raise ``UnavailableError`` at once.
        """
        task_status.started()
        try:
            await self._keep_connected()
        finally:
            self._refused(UnavailableError(f"the connection to {self._address} was given up"))

    async def _keep_connected(self) -> None:
        delay_ms: float = RECONNECT_DELAY_MIN_MS
        while True:
            began_s = time.monotonic()
            was_connected = False
            try:
                with trio.fail_after(CONNECT_TIMEOUT_MS / 1000):
                    link, challenge, welcome = await self._connect()
            except trio.TooSlowError:
                self._attempt_failed(f"no answer within {CONNECT_TIMEOUT_MS} ms")
            except OSError as error:
                self._attempt_failed(str(error))
            except CrailError as error:
                self._attempt_failed(error.message)
                if not error.retryable:
                    self._refused(error)
            else:
                self._refusal = None
                was_connected = True
                try:
                    await self._serve(link, challenge, welcome)
                finally:
                    link.close()
            if time.monotonic() - began_s >= STABLE_CONNECTION_S:
                delay_ms = RECONNECT_DELAY_MIN_MS
            await trio.sleep(delay_ms / 1000 * random.uniform(0.5, 1.0))
            delay_ms = min(delay_ms * RECONNECT_DELAY_GROWTH, RECONNECT_DELAY_MAX_MS)
            if not was_connected and self._locate is not None:
                await self._look_for_server(self._locate)

    async def _look_for_server(self, locate: Callable[[], Awaitable[str]]) -> None:
        """Not for long: whoever knows may be away too, while the server is back where it was."""
        with trio.move_on_after(LOCATE_TIMEOUT_S):
            try:
                self._address = parse_address(await locate())
            except CrailError as error:
                log.debug("where %s is now is not known: %s", self._address, error)

    async def _connect(self) -> tuple[Link, Challenge, Welcome]:
        link = Link(await connect_socket(self._address))
        try:
            challenge, welcome = await link.handshake(
                self._credentials, self._role, self._client_id
            )
        except BaseException:
            link.close()
            raise
        return link, challenge, welcome

    async def _serve(self, link: Link, challenge: Challenge, welcome: Welcome) -> None:
        """Returns when the connection has ended."""
        try:
            async with trio.open_nursery() as nursery:
                session = Session(link, nursery, self._pending, self._answered, self._on_push)
                self._session = session
                log.info("connected to %s", self._address)
                for call in list(self._pending.values()):
                    session.send(call)
                if self._on_connected is not None:
                    nursery.start_soon(self._greet, session, challenge, welcome)
                nursery.start_soon(session.run)
        finally:
            self._session = None
            if self._on_disconnected is not None:
                self._on_disconnected()
        self._attempt_failed(session.failure or "ended")

    async def _greet(self, session: Session, challenge: Challenge, welcome: Welcome) -> None:
        assert self._on_connected is not None
        try:
            await self._on_connected(welcome, challenge)
        except CrailError as error:
            session.fail(error.message)

    def _attempt_failed(self, reason: str) -> None:
        if reason != self._last_failure:
            log.warning("no connection to %s: %s", self._address, reason)
        self._last_failure = reason

    def _refused(self, error: CrailError) -> None:
        """Callers need not wait for a deadline: trying again changes nothing by itself."""
        self._refusal = error
        for call in list(self._pending.values()):
            call.finish(None, self._refusal_again())
            self._answered(call)

    def _refusal_again(self) -> CrailError:
        assert self._refusal is not None
        return type(self._refusal)(self._refusal.message)
