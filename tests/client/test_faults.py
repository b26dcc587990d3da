"""Servers that stop and come back while a client works."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from crailfs.client.filesystem import FileSystem, OpenFile
from crailfs.config import RegionConfig
from crailfs.errors import FencedError, UnavailableError
from crailfs.net.client import RpcClient
from crailfs.records import Tier
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Invalidation
from tests.client.helpers import (
    BLOCK,
    DISK_ONLY,
    content,
    create,
    eventually,
    free_blocks,
    open_by_name,
)
from tests.support.cluster import running_cluster


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_metadata_server_restarts_under_load_and_each_request_counts_once(
    tmp_path: Path, transport: str
) -> None:
    files = 60
    async with running_cluster(tmp_path) as cluster, cluster.client(transport) as client:
        log = await create(client, b"log")
        written = trio.Event()

        async def load() -> None:
            for number in range(files):
                file = await create(client, b"file %d" % number)
                await file.write(0, b"%d" % number * 1000)
                await file.close()
                await client.rename(
                    ROOT_INODE, b"file %d" % number, ROOT_INODE, b"done %d" % number
                )
                await log.append(b"%d\n" % number)
                if number == 10:
                    written.set()
            await log.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await written.wait()
            for _ in range(3):
                await cluster.metadata.stop()
                await cluster.start_metadata()
        names = {entry.name for entry in (await client.read_directory(ROOT_INODE)).entries}
        assert names == {b"log"} | {b"done %d" % number for number in range(files)}
        async with cluster.client() as other:
            for number in range(files):
                file = await open_by_name(other, b"done %d" % number)
                assert await content(file) == b"%d" % number * 1000
                await file.close()
            expected = b"".join(b"%d\n" % number for number in range(files))
            assert await content(await open_by_name(other, b"log")) == expected


async def test_a_storage_server_comes_back_with_one_more_region(tmp_path: Path) -> None:
    """Blocks there are begun before its descriptor is here, and changed after that."""
    async with running_cluster(tmp_path) as cluster, cluster.client("local") as client:
        await (await create(client, b"earlier")).write(0, b"x")
        await cluster.storage.stop()
        added = RegionConfig(tier=Tier.DISK, path=tmp_path / "added", size_bytes=64 << 20)
        config = cluster.storage_config
        cluster.storage_config = replace(config, regions=(*config.regions, added))
        await cluster.start_storage()
        begun = await create(client, b"begun", storage_class=DISK_ONLY)
        await begun.write(0, b"a" * 100)
        other = await create(client, b"other", storage_class=DISK_ONLY)
        await other.write(0, b"o" * BLOCK)
        await other.flush()
        await begun.write(100, b"b" * 100)
        await begun.write(50, b"c" * 10)
        await begun.flush()
        expected = b"a" * 50 + b"c" * 10 + b"a" * 40 + b"b" * 100
        assert await content(begun) == expected
        async with cluster.client() as reader:
            assert await content(await open_by_name(reader, b"begun")) == expected
            assert await content(await open_by_name(reader, b"other")) == b"o" * BLOCK
        await begun.close()
        await other.close()


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_storage_server_restarts(tmp_path: Path, transport: str) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client(transport) as client:
        file = await create(client)
        await file.write(0, b"before" * BLOCK)
        await file.flush()
        await cluster.storage.stop()
        await cluster.start_storage()
        assert await content(file) == b"before" * BLOCK
        await file.write(6 * BLOCK, b"after" * BLOCK)
        await file.close()
        assert await content(await open_by_name(client)) == b"before" * BLOCK + b"after" * BLOCK


async def test_a_storage_server_is_found_where_it_comes_back(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client("tcp") as client:
        file = await create(client)
        await file.write(0, b"before" * BLOCK)
        await file.flush()
        for _ in range(2):
            await cluster.storage.stop()
            anywhere = ("127.0.0.1:0",)
            old = cluster.storage_config.listen
            cluster.storage_config = replace(cluster.storage_config, listen=anywhere)
            await cluster.start_storage()
            assert cluster.storage_config.listen[0] not in old
            with trio.fail_after(5):
                await file.write(6 * BLOCK, b"after" * BLOCK)
                await file.flush()
                assert await content(file) == b"before" * BLOCK + b"after" * BLOCK
        await file.close()


async def test_no_storage_server_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        config = cluster.client_config("tcp", operation_timeout_ms=500)
        async with FileSystem.connect(config) as client:
            file = await create(client)
            await file.write(0, b"data")
            await file.flush()
            await cluster.storage.stop()

            async def read() -> None:
                with pytest.raises(UnavailableError):
                    await content(file)

            for _ in range(2):  # over the old connection, then by a new one
                with trio.fail_after(1.0):
                    async with trio.open_nursery() as readers:
                        for _ in range(4):
                            readers.start_soon(read)
            await cluster.start_storage()
            assert await content(file) == b"data"
            await file.close()


async def test_no_metadata_server_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        config = cluster.client_config(operation_timeout_ms=300)
        async with FileSystem.connect(config) as client:
            file = await create(client)
            await file.write(0, b"data")
            await cluster.metadata.stop()
            with trio.fail_after(5), pytest.raises(UnavailableError):
                await file.flush()
            await cluster.start_metadata()
            await file.flush()
            await file.close()
            assert await content(await open_by_name(client)) == b"data"
        await cluster.metadata.stop()
        with trio.fail_after(5), pytest.raises(UnavailableError):
            async with FileSystem.connect(config):
                pass
        await cluster.start_metadata()


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_what_was_not_committed_when_the_session_ended_is_reported_once(
    tmp_path: Path, transport: str
) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client(transport) as client:
        free = await free_blocks(client)
        lost = await create(client, b"lost")
        kept = await create(client, b"kept")
        await kept.write(0, b"committed")
        await kept.flush()
        await lost.write(0, b"never committed")
        old_id = client.client_id
        await cluster.metadata.stop()
        cluster.expire_session(old_id)
        await cluster.start_metadata()

        async def goes_on() -> bool:
            return client.client_id != old_id

        await eventually(goes_on)
        with pytest.raises(FencedError):
            await lost.read(0, 10)
        assert await content(lost) == b""
        await lost.write(0, b"written again")
        await lost.close()
        assert await content(kept) == b"committed"
        await kept.write(9, b"!")
        await kept.close()
        async with cluster.client() as other:
            assert await content(await open_by_name(other, b"lost")) == b"written again"
            assert await content(await open_by_name(other, b"kept")) == b"committed!"

        async def blocks_are_free_again() -> bool:
            return await free_blocks(client) == free - 2

        await eventually(blocks_are_free_again)


async def test_what_becomes_of_a_session_that_ended_does_not_end_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is kept for calls that are under way, and may be lost in turn."""

    async def there_always_are(client: RpcClient) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(RpcClient, "settle", there_always_are)
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as watching,
        cluster.client("tcp") as client,
    ):
        file = await create(client)
        first_id = client.client_id

        async def lose_the_first_session() -> None:
            await cluster.metadata.stop()
            cluster.expire_session(first_id)
            await cluster.start_metadata()

        async def all_are_connected() -> bool:
            return (await watching.status()).session_count == 3

        await lose_the_first_session()
        await eventually(all_are_connected)
        second_id = client.client_id
        assert second_id != first_id
        await file.write(0, b"still there")
        await lose_the_first_session()
        await eventually(all_are_connected)
        await file.flush()
        assert client.client_id == second_id
        assert await content(file) == b"still there"
        await file.close()


async def test_a_flush_that_waits_when_the_session_ends_is_told_so(tmp_path: Path) -> None:
    """Its storage server is away: it must not wait for that one until the deadline."""
    async with running_cluster(tmp_path) as cluster, cluster.client("tcp") as client:
        file = await create(client)
        await file.write(0, b"first")
        await file.flush()
        await cluster.storage.stop()
        await file.write(0, b"never committed")

        async def flush() -> None:
            with trio.fail_after(5), pytest.raises(FencedError):
                await file.flush()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            await cluster.metadata.stop()
            cluster.expire_session(client.client_id)
            await cluster.start_metadata()
        await cluster.start_storage()
        assert await content(file) == b"first"
        await file.write(0, b"again")
        await file.close()
        assert await content(await open_by_name(client)) == b"again"


@asynccontextmanager
async def written_once(
    tmp_path: Path,
) -> AsyncIterator[tuple[FileSystem, OpenFile, trio.Event]]:
    """A client that knows a file, and the file as the one that wrote it has it open: it waits 0.3 s
    for an answer, and the first takes its time to drop what it cached, until the event."""
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as slow,
        FileSystem.connect(cluster.client_config(operation_timeout_ms=300)) as client,
    ):
        file = await create(client)
        await file.write(0, b"one")
        await file.flush()
        assert await content(await open_by_name(slow)) == b"one"
        proceed = trio.Event()

        async def on_invalidate(entries: tuple[Invalidation, ...]) -> None:
            await proceed.wait()

        slow.on_invalidate = on_invalidate
        yield slow, file, proceed


async def test_a_commit_that_was_carried_out_but_not_answered(tmp_path: Path) -> None:
    """The other client takes its time to drop what it cached, beyond the writer's deadline."""
    async with written_once(tmp_path) as (slow, file, proceed):
        await file.write(3, b" two" * BLOCK)
        with pytest.raises(UnavailableError):
            await file.flush()
        assert await content(file) == b"one" + b" two" * BLOCK
        proceed.set()
        await file.write(0, b"ONE")
        await file.close()
        assert await content(await open_by_name(slow)) == b"ONE" + b" two" * BLOCK


async def test_fsync_makes_durable_what_an_unanswered_commit_carried_out(tmp_path: Path) -> None:
    async with written_once(tmp_path) as (slow, file, proceed):
        await file.write(3, b" two")
        with pytest.raises(UnavailableError):
            await file.flush()
        proceed.set()
        await file.fsync()
        assert (await slow.attributes(file.ino)).synced
        await file.truncate(2)
        assert await content(file) == b"on"
        await file.close()


async def test_late_errors_of_writes_come_out_at_flush(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        config = cluster.client_config("tcp", operation_timeout_ms=500)
        async with FileSystem.connect(config) as client:
            file = await create(client)
            await file.write(0, b"committed" * BLOCK)
            await file.flush()
            await cluster.storage.stop()
            await file.write(0, b"x" * BLOCK)
            with trio.fail_after(5), pytest.raises(UnavailableError):
                await file.flush()
            await cluster.start_storage()
            assert await content(file) == b"committed" * BLOCK
            await file.write(0, b"y" * BLOCK)
            await file.close()
            expected = b"y" * BLOCK + (b"committed" * BLOCK)[BLOCK:]
            assert await content(await open_by_name(client)) == expected


async def test_a_client_that_closes_leaves_no_session_behind(tmp_path: Path) -> None:
    """So a crash of the metadata server right after it makes nobody wait for it."""
    async with running_cluster(tmp_path) as cluster, cluster.client() as watching:
        before = (await watching.status()).session_count
        async with cluster.client() as client:
            file = await create(client, b"f")
            await file.write(0, b"bytes")
            await file.close()
            assert (await watching.status()).session_count == before + 1
        assert (await watching.status()).session_count == before
