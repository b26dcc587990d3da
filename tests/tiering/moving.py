"""A cluster whose mover the test drives step by step."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from crailfs.client.filesystem import FileSystem
from crailfs.config import ClientConfig
from crailfs.net.client import RpcClient
from crailfs.records import Tier
from crailfs.wire.messages import Role
from storage_server.mover import Mover
from tests.support.cluster import Cluster, running_cluster

BLOCK = 65_536
RATE = 1 << 40
"""Bytes per second: as fast as it goes."""

tiered_cluster = partial(running_cluster, memory_bytes=4 << 20, disk_bytes=128 << 20)


class SteppedMover:
    def __init__(
        self, metadata: RpcClient, server_id: bytes, config: ClientConfig, rate: int
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.before_next_piece: Callable[[], Awaitable[None]] | None = None
        """Done once, in the middle of the next move."""
        self._mover = Mover(
            metadata,
            server_id,
            config,
            bytes_per_second=rate,
            requests_served=lambda: 0,
            counters=self.counters,
        )
        self._pace = self._mover._pace
        self._mover._pace = self._before_piece  # type: ignore[method-assign]

    async def settle(self) -> None:
        """Move until there is nothing more that can be moved."""
        while await self.step():
            pass

    async def step(self) -> bool:
        return await self._mover.step()

    async def _before_piece(self, urgent: bool, byte_count: int) -> None:
        action, self.before_next_piece = self.before_next_piece, None
        if action is not None:
            await action()
        await self._pace(urgent, byte_count)


@asynccontextmanager
async def stepped_mover(cluster: Cluster, *, rate: int = RATE) -> AsyncIterator[SteppedMover]:
    """As the storage server of ``cluster`` would run it."""
    config = cluster.client_config()
    metadata = RpcClient(
        config.metadata,
        config.credentials,
        role=Role.STORAGE_SERVER,
        client_id=secrets.randbits(63) + 1,
    )
    async with cluster.client() as client:
        (server,) = (await client.cluster_map()).servers
    mover = SteppedMover(metadata, server.id, config, rate)
    async with trio.open_nursery() as nursery:
        await nursery.start(metadata.run)
        yield mover
        nursery.cancel_scope.cancel()


async def used_blocks(client: FileSystem, tier: Tier) -> int:
    for found in (await client.statistics()).tiers:
        if found.tier is tier:
            return found.total_blocks - found.free_blocks
    raise AssertionError(f"no region of tier {tier.name}")


async def blocks_by_tier(client: FileSystem, ino: int) -> dict[Tier, int]:
    """Where a file's blocks lie."""
    tiers = {region.id: region.info.tier for region in (await client.cluster_map()).regions}
    found: Counter[Tier] = Counter()
    for extent in await client.extents(ino):
        found[tiers[extent.replicas[0].region]] += extent.block_count
    return dict(found)
