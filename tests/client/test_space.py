"""Tiers, a full cluster, and blocks coming back."""

from __future__ import annotations

from pathlib import Path

import pytest

from crailfs.client.filesystem import FileSystem
from crailfs.errors import NoSpaceError
from crailfs.records import Durability, NodeKind, StorageClass, Tier
from crailfs.units import MIB, ROOT_INODE
from tests.client.helpers import (
    BLOCK,
    MEMORY_ONLY,
    content,
    create,
    eventually,
    free_blocks,
    open_by_name,
)
from tests.support.cluster import running_cluster

PIECE = 4 * BLOCK


async def used_blocks(client: FileSystem) -> dict[Tier, int]:
    tiers = (await client.statistics()).tiers
    return {tier.tier: tier.total_blocks - tier.free_blocks for tier in tiers}


async def fill(client: FileSystem, name: bytes, storage_class: StorageClass | None = None) -> int:
    """Write pieces of a recognisable pattern until there is no space; returns how many."""
    file = await create(client, name, storage_class=storage_class)
    count = 0
    with pytest.raises(NoSpaceError):
        while True:
            await file.write(count * PIECE, bytes([count % 251 + 1]) * PIECE)
            count += 1
    await file.close()
    return count


async def test_a_full_tier_falls_through_in_mid_file(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path, memory_bytes=2 * MIB, disk_bytes=4 * MIB) as cluster,
        cluster.client() as client,
    ):
        file = await create(client)
        data = b"".join(bytes([number]) * BLOCK for number in range(48))
        await file.write(0, data)
        await file.flush()
        used = await used_blocks(client)
        assert used[Tier.MEMORY] > 0 and used[Tier.DISK] > 0
        assert await content(file) == data
        await file.close()


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_usable_after_no_space(tmp_path: Path, transport: str) -> None:
    async with (
        running_cluster(tmp_path, memory_bytes=1 * MIB, disk_bytes=1 * MIB) as cluster,
        cluster.client(transport) as client,
    ):
        count = await fill(client, b"big")
        assert count >= 2 * MIB // PIECE - 2, "every tier was used up"
        file = await open_by_name(client, b"big")
        for number in range(count):
            expected = bytes([number % 251 + 1]) * PIECE
            assert bytes(await file.read(number * PIECE, PIECE)) == expected
        await file.truncate(PIECE)
        await file.write(PIECE, b"there is room again")
        await file.close()
        await client.remove(ROOT_INODE, b"big", directory=False)
        assert await fill(client, b"again") >= count - 1


async def test_space_held_in_pools_is_given_up_before_it_is_called_full(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path, memory_bytes=1 * MIB, disk_bytes=1 * MIB) as cluster,
        cluster.client() as client,
    ):
        small = await create(client, b"small")
        await small.write(0, b"takes a pool of any tier")
        total = 1 * MIB // BLOCK
        file = await create(client, storage_class=MEMORY_ONLY)
        written = 0
        with pytest.raises(NoSpaceError):
            while True:
                await file.write(written, b"m" * BLOCK)
                written += BLOCK
        assert written // BLOCK >= total - 3, "only the small file's block is not to be had"
        await file.close()
        await small.close()


async def test_idle_pools_go_back(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        free = await free_blocks(client)
        file = await create(client)
        await file.write(0, b"one block")
        await file.close()
        assert await free_blocks(client) < free - 1

        async def is_back() -> bool:
            return await free_blocks(client) == free - 1

        await eventually(is_back)


async def test_closing_the_client_gives_everything_back(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        async with cluster.client() as client:
            free = await free_blocks(client)
            file = await create(client)
            await file.write(0, b"x" * 10 * BLOCK)
            await file.truncate(0)
        async with cluster.client() as client:
            assert await free_blocks(client) == free


async def test_small_files_need_two_requests_each(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        directory = await client.create_node(
            ROOT_INODE, b"d", NodeKind.DIRECTORY, mode=0o755, uid=0, gid=0
        )
        parent = directory.attributes.ino

        async def write_one(number: int) -> None:
            file = await create(client, b"%d" % number, parent=parent)
            await file.write(0, b"x" * 4096)
            await file.close()

        for number in range(20):
            await write_one(number)
        before = (await client.status()).counters
        for number in range(100, 105):
            await write_one(number)
        after = (await client.status()).counters
        changed = {name: after[name] - before.get(name, 0) for name in after}
        requests = {name: count for name, count in changed.items() if name.startswith("requests_")}
        for by_timer in (
            "requests_keep_alive",
            "requests_get_status",
            "requests_storage_heartbeat",
        ):
            requests.pop(by_timer, None)
        assert {name: count for name, count in requests.items() if count} == {
            "requests_create_node": 5,
            "requests_commit_file": 5,
        }


async def test_a_class_that_asks_for_durable_closes(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        reply = await client.create_node(
            ROOT_INODE, b"f", NodeKind.FILE, mode=0o644, uid=0, gid=0,
            durability=Durability.CLOSE, storage_class=StorageClass(Tier.DISK, Tier.DISK),
        )  # fmt: skip
        file = await client.open(reply.attributes.ino)
        await file.write(0, b"durable")
        await file.close()
        assert await content(await open_by_name(client, b"f")) == b"durable"
