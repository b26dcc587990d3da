"""Any host: each read and write is a request to the storage server, its bytes the payload.

What is longer than one payload may be is asked for in pieces, several of them in flight.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from crailfs.config import ClientConfig
from crailfs.errors import CrailError, ProtocolError, TryAgainError, UnavailableError
from crailfs.limits import CONNECT_TIMEOUT_MS, PAYLOAD_MAX_BYTES
from crailfs.net.client import RpcClient
from crailfs.net.sending import Buffer
from crailfs.records import StorageServerInfo
from crailfs.transports.staging import stable
from crailfs.units import MIB
from crailfs.wire.messages import (
    FlushRegion,
    FlushReply,
    Message,
    Opcode,
    ReadBlocks,
    Role,
    StorageStatus,
    WriteBlocks,
)

PIECES_IN_FLIGHT_MAX: Final = 4
RETRY_DELAY_MIN_S: Final = 0.01
RETRY_DELAY_MAX_S: Final = 0.2


class TcpTransport:
    """See ``Transport``."""

    name = "tcp"
    write_piece_bytes = 1 * MIB

    def __init__(self, client: RpcClient, timeout_ms: int) -> None:
        self._client = client
        self._timeout_ms = timeout_ms
        self._running = trio.CancelScope()

    @property
    def _open_client(self) -> RpcClient:
        self.check_open()
        return self._client

    def check_open(self) -> None:
        """Raises ``UnavailableError`` once it was closed."""
        if self._running.cancel_called:
            raise UnavailableError("the connection to the storage server was closed")

    @classmethod
    async def connect(
        cls,
        server: StorageServerInfo,
        config: ClientConfig,
        client_id: int,
        nursery: trio.Nursery,
        locate: Callable[[], Awaitable[StorageServerInfo]] | None = None,
        on_disconnected: Callable[[], None] | None = None,
    ) -> TcpTransport:
        """Connect to ``server``; the connection lives in ``nursery`` until ``close``.

        ``locate`` is asked where the server is when it is no longer where it was;
        ``on_disconnected`` is called whenever a connection has ended.

        Raises ``UnavailableError`` and what the server answers.
        """
        client = RpcClient(
            _address(server),
            config.credentials,
            role=Role.CLIENT,
            client_id=client_id,
            on_disconnected=on_disconnected,
            locate=None if locate is None else partial(_locate_address, locate),
        )
        transport = cls(client, config.operation_timeout_ms)
        nursery.start_soon(transport._run)
        deadline_ms = min(CONNECT_TIMEOUT_MS, config.operation_timeout_ms)
        try:
            await client.call(Opcode.STORAGE_STATUS, StorageStatus(), deadline_ms=deadline_ms)
        except BaseException:
            transport._running.cancel()
            raise
        return transport

    async def call(
        self, opcode: Opcode, request: Message, deadline_ms: int | None = None
    ) -> Message:
        """A request that has no payload. Raises what the server answers, or ``UnavailableError`` at
        the deadline, at the latest after the operation timeout."""
        timeout_ms = self._timeout_ms
        return await self._open_client.call(
            opcode, request, deadline_ms=min(deadline_ms or timeout_ms, timeout_ms)
        )

    def in_place(self, region: int) -> bool:
        return False

    def stage(self, data: Buffer) -> Buffer:
        return stable(data)

    async def read(self, region: int, offset: int, byte_count: int) -> Buffer:
        buffer = bytearray(byte_count)
        view = memoryview(buffer)
        await self._in_pieces(
            byte_count, lambda begin, end: self._read_piece(region, offset + begin, view[begin:end])
        )
        return buffer

    async def write(self, region: int, offset: int, generation: int, data: Buffer) -> None:
        view = memoryview(data)
        await self._in_pieces(
            len(view),
            lambda begin, end: self._write_piece(
                WriteBlocks(region, offset + begin, generation), view[begin:end]
            ),
        )

    async def flush(self, region: int) -> bool:
        reply = await self._retrying(
            partial(self._open_client.call, Opcode.FLUSH_REGION, FlushRegion(region))
        )
        if not isinstance(reply, FlushReply):
            raise ProtocolError("the storage server answered a flush with something else")
        return reply.durable

    async def close(self) -> None:
        self._running.cancel()

    async def _run(self) -> None:
        with self._running:
            await self._client.run()

    async def _read_piece(self, region: int, offset: int, into: memoryview) -> None:
        await self._retrying(
            partial(
                self._open_client.call,
                Opcode.READ_BLOCKS,
                ReadBlocks(region, offset, len(into)),
                into=into,
            )
        )

    async def _write_piece(self, request: WriteBlocks, data: memoryview) -> None:
        await self._retrying(
            partial(self._open_client.call, Opcode.WRITE_BLOCKS, request, payload=data)
        )

    async def _retrying(self, call: Callable[..., Awaitable[Message]]) -> Message:
        """A server whose disks are behind, or that has just been started, asks to try again later:
        this is done until the deadline."""
        deadline_s = trio.current_time() + self._timeout_ms / 1000
        delay_s = RETRY_DELAY_MIN_S
        while True:
            try:
                return await call(
                    deadline_ms=max(1, int((deadline_s - trio.current_time()) * 1000))
                )
            except TryAgainError:
                if trio.current_time() + delay_s >= deadline_s:
                    raise
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_DELAY_MAX_S)

    async def _in_pieces(
        self, byte_count: int, piece: Callable[[int, int], Awaitable[None]]
    ) -> None:
        """Run ``piece(begin, end)`` over 0..byte_count. The first error ends all the others."""
        if byte_count <= PAYLOAD_MAX_BYTES:
            await piece(0, byte_count)
            return
        begins = iter(range(0, byte_count, PAYLOAD_MAX_BYTES))
        failures: list[CrailError] = []

        async def work(scope: trio.CancelScope) -> None:
            for begin in begins:
                try:
                    await piece(begin, min(begin + PAYLOAD_MAX_BYTES, byte_count))
                except CrailError as error:
                    failures.append(error)
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(PIECES_IN_FLIGHT_MAX):
                nursery.start_soon(work, nursery.cancel_scope)
        if failures:
            raise failures[0]


async def _locate_address(locate: Callable[[], Awaitable[StorageServerInfo]]) -> str:
    return _address(await locate())


def _address(server: StorageServerInfo) -> str:
    return f"{server.tcp_host}:{server.tcp_port}"
