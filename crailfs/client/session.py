"""This client's session with the metadata server."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import trio

from crailfs.client.cache import NodeCache, Ticket
from crailfs.config import ClientConfig
from crailfs.errors import CrailError, ProtocolError, TryAgainError, UnavailableError
from crailfs.limits import KEEPALIVE_INTERVAL_MS, LEASE_MS, REPLIES_KEPT_PER_CLIENT_MAX
from crailfs.net.client import RpcClient
from crailfs.wire.messages import (
    OPERATIONS,
    Challenge,
    EndSession,
    Invalidate,
    InvalidateReply,
    Invalidation,
    KeepAlive,
    KeepAliveReply,
    Message,
    Opcode,
    Role,
    Welcome,
)

log = logging.getLogger(__name__)

_RETRY_MIN_SECONDS: Final = 0.005
_RETRY_MAX_SECONDS: Final = 0.25
_MUTATIONS_PER_KEEPALIVE_MAX: Final = REPLIES_KEPT_PER_CLIENT_MAX // 4


_END_TIMEOUT_MS: Final = 1_000
"""How long to wait for an answer to the good-bye."""


class Session:
    """Owns the connection, and the identity under which the servers know this client.

    When the metadata server has ended the session, everything granted under the old client id may
    be given to others, and the storage servers refuse that id. The session then goes on under a new
    one, after ``on_lost`` was called.
    """

    def __init__(
        self,
        config: ClientConfig,
        *,
        on_invalidate: Callable[[tuple[Invalidation, ...]], Awaitable[tuple[int, ...]]],
        on_lost: Callable[[], None],
        on_tick: Callable[[], Awaitable[None]],
        open_inodes: Callable[[], Iterable[int]],
    ) -> None:
        self.cache = NodeCache(LEASE_MS)
        self.client_id = 0
        self._config = config
        self._on_invalidate = on_invalidate
        self._on_lost = on_lost
        self._on_tick = on_tick
        self._open_inodes = open_inodes
        self._was_welcomed = False
        self._ended = trio.Event()
        """Set when the metadata server has ended the session."""
        self._mutations = 0
        self._keepalive_due = trio.Event()
        self._begin()

    def _begin(self) -> None:
        self.client_id = secrets.randbits(63) + 1
        self._was_welcomed = False
        ended = self._ended = trio.Event()
        self._rpc = RpcClient(
            self._config.metadata,
            self._config.credentials,
            role=Role.CLIENT,
            client_id=self.client_id,
            on_push=self._pushed,
            on_connected=functools.partial(self._connected, ended),
            on_disconnected=functools.partial(self._disconnected, ended),
        )

    @property
    def operation_timeout_s(self) -> float:
        """How long an operation may wait for servers before it is an error."""
        return self._config.operation_timeout_ms / 1000

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the session until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._run_connection, self._rpc, self._ended)
                await self._ended.wait()
                log.warning(
                    "session %016x has ended at the metadata server: what was not committed is"
                    " lost; going on with a new one",
                    self.client_id,
                )
                self.cache.disconnect()
                self._begin()
                self._on_lost()

    async def _run_connection(self, rpc: RpcClient, ended: trio.Event) -> None:
        async with trio.open_nursery() as connection:
            connection.start_soon(rpc.run)
            async with trio.open_nursery() as alive:
                alive.start_soon(self._keep_alive, rpc)
                await ended.wait()
                alive.cancel_scope.cancel()
            # Calls that are under way still get their answers.
            await rpc.settle()
            connection.cancel_scope.cancel()

    async def call(
        self, opcode: Opcode, request: Message, *, deadline_ms: int | None = None
    ) -> Any:
        """The reply, of the type that ``OPERATIONS`` names.

        Raises the server's ``CrailError``, and ``UnavailableError`` at the deadline.
        """
        timeout_ms = self._config.operation_timeout_ms if deadline_ms is None else deadline_ms
        if OPERATIONS[opcode].mutates:
            self._mutations += 1
            if self._mutations >= _MUTATIONS_PER_KEEPALIVE_MAX:
                self._keepalive_due.set()
        try:
            return await self._rpc.call(opcode, request, deadline_ms=timeout_ms)
        except TryAgainError as error:
            return await self._retry(opcode, request, timeout_ms, error)

    async def end(self) -> None:
        """Tell the metadata server that this client ends; without an answer, the session does when
        the silence has been noticed."""
        try:
            await self._rpc.call(Opcode.END_SESSION, EndSession(), deadline_ms=_END_TIMEOUT_MS)
        except CrailError as error:
            log.debug("the session is left to expire: %s", error)

    async def _retry(
        self, opcode: Opcode, request: Message, timeout_ms: int, error: TryAgainError
    ) -> Any:
        deadline = trio.current_time() + timeout_ms / 1000
        delay = _RETRY_MIN_SECONDS
        while True:
            left_ms = int((deadline - trio.current_time() - delay) * 1000)
            if left_ms <= 0:
                raise UnavailableError(
                    f"{opcode.name} was put off for {timeout_ms} ms: {error.message}"
                ) from error
            await trio.sleep(delay)
            delay = min(delay * 2, _RETRY_MAX_SECONDS)
            try:
                return await self._rpc.call(opcode, request, deadline_ms=left_ms)
            except TryAgainError as again:
                error = again

    async def _connected(self, ended: trio.Event, welcome: Welcome, challenge: Challenge) -> None:
        if ended is not self._ended:
            return  # of a session that ended before: it says nothing of this one
        self.cache.lease_seconds = welcome.lease_ms / 1000
        if welcome.session_is_new and self._was_welcomed:
            ended.set()
        self._was_welcomed = True

    def _disconnected(self, ended: trio.Event) -> None:
        if ended is self._ended:
            self.cache.disconnect()

    async def _pushed(self, opcode: Opcode, request: Message) -> Message:
        if not isinstance(request, Invalidate):
            raise ProtocolError(f"{opcode.name} is nothing that a client answers")
        return InvalidateReply(await self._on_invalidate(request.entries))

    async def _keep_alive(self, rpc: RpcClient) -> None:
        while True:
            with trio.move_on_after(KEEPALIVE_INTERVAL_MS / 1000) as pause:
                await self._keepalive_due.wait()
            if not pause.cancelled_caught:
                self._keepalive_due = trio.Event()
            self._mutations = 0
            await self._renew(rpc)
            if pause.cancelled_caught:
                await self._on_tick()

    async def _renew(self, rpc: RpcClient) -> None:
        ticket: Ticket = self.cache.ticket()
        nodes = self.cache.to_renew(self._open_inodes())
        request = KeepAlive(rpc.completed_below, tuple(node.ino for node in nodes))
        try:
            reply = await rpc.call(Opcode.KEEP_ALIVE, request, deadline_ms=LEASE_MS)
        except CrailError as error:
            log.debug("keep-alive failed, leases run out: %s", error)
            return
        assert isinstance(reply, KeepAliveReply)
        gone = frozenset(reply.gone)
        self.cache.renewed((node for node in nodes if node.ino not in gone), ticket)
        for ino in gone:
            self.cache.forget(ino)
