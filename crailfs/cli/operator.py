"""Questions that an operator asks servers: without a session, without a mount."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from crailfs.config import ClientConfig
from crailfs.errors import CrailError
from crailfs.net.client import RpcClient
from crailfs.records import StorageServerInfo
from crailfs.wire.messages import (
    GetStatus,
    Opcode,
    Role,
    Status,
    StorageStatus,
    StorageStatusReply,
)

ANSWER_TIMEOUT_MAX_MS = 5_000
"""An operator does not wait as long as a program that has work to do."""


@asynccontextmanager
async def connected(address: str, config: ClientConfig) -> AsyncIterator[RpcClient]:
    """A connection to one server as an operator; the first call says whether it works."""
    client = RpcClient(
        address, config.credentials, role=Role.OPERATOR, client_id=secrets.randbits(64)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()


async def cluster_status(metadata: RpcClient, config: ClientConfig) -> Status:
    reply = await metadata.call(
        Opcode.GET_STATUS, GetStatus(), deadline_ms=_answer_timeout_ms(config)
    )
    assert isinstance(reply, Status)
    return reply


async def storage_statuses(
    servers: Sequence[StorageServerInfo], config: ClientConfig
) -> dict[bytes, StorageStatusReply | str]:
    """What each server that is alive says of itself, by id, or in its place why it does not."""
    found: dict[bytes, StorageStatusReply | str] = {}

    async def ask(server: StorageServerInfo) -> None:
        try:
            async with connected(address_of(server), config) as client:
                reply = await client.call(
                    Opcode.STORAGE_STATUS, StorageStatus(), deadline_ms=_answer_timeout_ms(config)
                )
            assert isinstance(reply, StorageStatusReply)
            found[server.id] = reply
        except* CrailError as group:
            found[server.id] = "; ".join(str(error) for error in group.exceptions)

    async with trio.open_nursery() as nursery:
        for server in servers:
            if server.alive:
                nursery.start_soon(ask, server)
    return found


def address_of(server: StorageServerInfo) -> str:
    """Where to ask: over TCP if it listens there, else on its Unix socket."""
    return f"{server.tcp_host}:{server.tcp_port}" if server.tcp_port else f"unix:{server.unix_path}"


def usable_transports(server: StorageServerInfo, names: Sequence[str], boot_id: str) -> list[str]:
    """Of the transports a client on this host tries, in its order, those the server offers it."""
    offered = set()
    if server.unix_path and server.boot_id == boot_id:
        offered.add("local")
    if server.tcp_port:
        offered.add("tcp")
        if server.rdma:
            offered.add("rdma")
    return [name for name in names if name in offered]


def _answer_timeout_ms(config: ClientConfig) -> int:
    return min(ANSWER_TIMEOUT_MAX_MS, config.operation_timeout_ms)
