"""A cluster whose regions keep headers, and whose metadata server can lose its state."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from crailfs.cli.operator import cluster_status, connected
from crailfs.client.filesystem import FileSystem
from crailfs.config import RegionConfig
from crailfs.records import NodeKind, Tier
from crailfs.units import MIB, ROOT_INODE
from crailfs.wire.messages import Status
from tests.support.cluster import Cluster, server_configs

CLUSTER_ID = b"the old cluster."


class SalvageCluster(Cluster):
    """``running_cluster`` with other regions, and without its audit at the end."""

    async def status(self) -> Status:
        config = self.client_config()
        async with connected(config.metadata, config) as metadata:
            return await cluster_status(metadata, config)

    async def headers_followed(self) -> None:
        """Until the regions' headers say what the name space says: asked 20 times a second."""
        with trio.fail_after(20):
            while (await self.status()).counters["header_changes_waiting"]:  # noqa: ASYNC110
                await trio.sleep(0.05)

    async def lose_name_space(self) -> None:
        """Stop everything, remove the metadata server's state, start everything."""
        await self.storage.stop()
        await self.metadata.stop()
        shutil.rmtree(self.metadata_config.state)
        await self.start_metadata()
        await self.start_storage()


@asynccontextmanager
async def salvage_cluster(
    directory: Path, *tiers: Tier, region_bytes: int = 24 * MIB
) -> AsyncIterator[SalvageCluster]:
    """One region of each of ``tiers``: persistent memory and memory as files on tmpfs, others as
    files below ``directory``."""
    with tempfile.TemporaryDirectory(prefix="crailfs-test-", dir="/dev/shm") as in_memory:
        places = {Tier.PMEM: Path(in_memory), Tier.MEMORY: Path(in_memory)}
        regions = tuple(
            RegionConfig(
                tier=tier,
                path=places.get(tier, directory) / f"{number}-{tier.name.lower()}",
                size_bytes=region_bytes,
            )
            for number, tier in enumerate(tiers)
        )
        configs = server_configs(directory, regions, cluster_id=CLUSTER_ID)
        cluster = SalvageCluster(directory, *configs)
        async with trio.open_nursery() as nursery:
            await cluster.run(nursery)
            yield cluster
            nursery.cancel_scope.cancel()


# --- files --------------------------------------------------------------------------------------


async def create(fs: FileSystem, name: bytes, parent: int = ROOT_INODE) -> int:
    reply = await fs.create_node(
        parent, name, NodeKind.FILE, mode=0o644, uid=0, gid=0, exclusive=False
    )
    return reply.attributes.ino


async def write(fs: FileSystem, ino: int, *pieces: tuple[int, bytes], cut: int = -1) -> None:
    async with await fs.open(ino) as file:
        for offset, data in pieces:
            await file.write(offset, data)
            await file.flush()
        if cut >= 0:
            await file.truncate(cut)


async def read(fs: FileSystem, ino: int) -> bytes:
    async with await fs.open(ino) as file:
        return bytes(await file.read(0, file.attributes.size))


async def names(fs: FileSystem, ino: int) -> dict[bytes, int]:
    page = await fs.read_directory(ino)
    return {entry.name: entry.attributes.ino for entry in page.entries}
