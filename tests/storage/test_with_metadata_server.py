"""The storage server below the real metadata server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from crailfs.config import ClientConfig, MetadataConfig, RegionConfig, StorageConfig
from crailfs.errors import NoSpaceError, TryAgainError
from crailfs.net.client import RpcClient
from crailfs.records import ANY_TIER, StorageClass, Tier
from crailfs.transports import connect
from crailfs.units import MIB
from crailfs.wire.messages import (
    Audit,
    AuditReply,
    GetClusterMap,
    GetStatistics,
    Grant,
    GrantBlocks,
    Opcode,
    Role,
    Statistics,
)
from metadata_server import server as metadata_server
from storage_server.server import serve
from tests.storage.cluster import BLOCK, CREDENTIALS

REGION_SIZE = 4 * MIB
TIMINGS = metadata_server.Timings(lease_ms=200, session_timeout_ms=400, storage_timeout_ms=5_000)


@contextlib.asynccontextmanager
async def metadata_running(directory: Path) -> AsyncIterator[str]:
    config = MetadataConfig(
        state=directory / "metadata",
        listen=(f"unix:{directory}/metadata.sock",),
        credentials=CREDENTIALS,
    )
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(partial(metadata_server.serve, config, timings=TIMINGS))
        yield bound[0]
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def storage_running(directory: Path, metadata: str) -> AsyncIterator[None]:
    config = StorageConfig(
        state=directory / "storage",
        metadata=metadata,
        listen=(f"unix:{directory}/storage.sock", "127.0.0.1:0"),
        regions=tuple(
            RegionConfig(tier=tier, path=directory / tier.name, size_bytes=REGION_SIZE)
            for tier in (Tier.MEMORY, Tier.DISK)
        ),
        credentials=CREDENTIALS,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, config))
        yield
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def client_of(metadata: str, client_id: int) -> AsyncIterator[RpcClient]:
    client = RpcClient(metadata, CREDENTIALS, role=Role.CLIENT, client_id=client_id)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


async def free_blocks(client: RpcClient) -> dict[Tier, int]:
    statistics = await client.call(Opcode.GET_STATISTICS, GetStatistics())
    assert isinstance(statistics, Statistics)
    return {tier.tier: tier.free_blocks for tier in statistics.tiers}


async def grant(client: RpcClient, block_count: int, storage_class: StorageClass) -> Grant:
    request = GrantBlocks(storage_class, "", "here", block_count, block_count)
    reply = await client.call(Opcode.GRANT_BLOCKS, request)
    assert isinstance(reply, Grant)
    return reply


async def test_all_space_can_be_used_as_soon_as_it_has_started(tmp_path: Path) -> None:
    async with (
        metadata_running(tmp_path) as metadata,
        storage_running(tmp_path, metadata),
        client_of(metadata, 1) as client,
    ):
        everything = REGION_SIZE // BLOCK
        assert await free_blocks(client) == {Tier.MEMORY: everything, Tier.DISK: everything}
        (run,) = (await grant(client, 10, ANY_TIER)).runs
        cluster = await client.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
        config = ClientConfig(metadata=metadata, credentials=CREDENTIALS)
        async with trio.open_nursery() as nursery:
            transport = await connect(cluster.servers[0], config, 1, nursery)
            await transport.write(run.region, run.block * BLOCK, run.generation, b"x" * BLOCK)
            await transport.close()


async def test_a_restarted_server_has_the_same_regions(tmp_path: Path) -> None:
    async with metadata_running(tmp_path) as metadata:
        maps = []
        for client_id in (1, 2):
            async with (
                storage_running(tmp_path, metadata),
                client_of(metadata, client_id) as client,
            ):
                cluster = await client.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
                maps.append([(placed.id, placed.info.uuid) for placed in cluster.regions])
        assert len(maps[0]) == 2
        assert maps[0] == maps[1]


async def test_a_vanished_clients_blocks_come_back_once_it_lets_go_of_its_life_line(
    tmp_path: Path,
) -> None:
    async with (
        metadata_running(tmp_path) as metadata,
        storage_running(tmp_path, metadata),
        trio.open_nursery() as nursery,
    ):
        async with client_of(metadata, 1) as vanishing:
            before = await free_blocks(vanishing)
            cluster = await vanishing.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
            config = ClientConfig(metadata=metadata, credentials=CREDENTIALS)
            transport = await connect(cluster.servers[0], config, 1, nursery)
            taken = await grant(vanishing, 10, StorageClass(Tier.MEMORY, Tier.MEMORY))
        async with client_of(metadata, 2) as other:
            with trio.fail_after(10):
                while not (tmp_path / "storage" / "fenced").exists():  # noqa: ASYNC110
                    await trio.sleep(0.01)
            # All the memory there is, but not what the first client may still write into.
            rest = await grant(other, 64, StorageClass(Tier.MEMORY, Tier.MEMORY))
            assert sum(run.block_count for run in rest.runs) == 54
            await transport.close()
            with trio.fail_after(10):
                again = await grant_when_free(other)
            assert again.runs[0].block == taken.runs[0].block
            assert again.runs[0].generation > taken.runs[0].generation
            assert before[Tier.MEMORY] == 64
            audit = await other.call(Opcode.AUDIT, Audit())
            assert isinstance(audit, AuditReply) and audit.findings == ()


async def grant_when_free(client: RpcClient) -> Grant:
    while True:
        try:
            return await grant(client, 10, StorageClass(Tier.MEMORY, Tier.MEMORY))
        except (NoSpaceError, TryAgainError):
            await trio.sleep(0.02)
