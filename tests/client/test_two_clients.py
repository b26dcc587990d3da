"""Two clients of one cluster: close-to-open, invalidation, merging, unlinked files."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import trio

from crailfs.client.filesystem import FileSystem
from crailfs.errors import NotFoundError, StaleError
from crailfs.limits import FILE_SIZE_MAX_BYTES
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Invalidation, RenameFlag
from metadata_server.ops import get_extents
from storage_server.media.disk import DiskMedium
from tests.client.helpers import (
    BLOCK,
    DISK_ONLY,
    MEMORY_ONLY,
    content,
    create,
    free_blocks,
    open_by_name,
)
from tests.support.cluster import running_cluster


async def test_close_to_open(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("local") as one,
        cluster.client("tcp") as two,
    ):
        for round_number in range(5):
            text = b"round %d" % round_number * (round_number * 10_000 + 1)
            writer = await open_by_name(one) if round_number else await create(one)
            await writer.truncate(0)
            await writer.write(0, text)
            await writer.close()
            assert await content(await open_by_name(two)) == text
            one, two = two, one


async def test_an_open_handle_sees_what_another_client_committed(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        writer = await create(one)
        await writer.write(0, b"before")
        await writer.flush()
        reader = await open_by_name(two)
        assert await content(reader) == b"before"
        await writer.write(0, b"after!")
        assert await content(reader) == b"before", "not committed: not seen"
        await writer.flush()
        assert await content(reader) == b"after!", "the commit took the old map from the cache"
        await writer.close()


async def test_names_that_another_client_changes(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        with pytest.raises(NotFoundError):
            await two.lookup(ROOT_INODE, b"file")
        file = await create(one)
        assert (await two.lookup(ROOT_INODE, b"file")).ino == file.ino
        await two.set_attributes(file.ino, mode=0o600)
        assert (await one.attributes(file.ino)).mode == 0o600
        await one.rename(ROOT_INODE, b"file", ROOT_INODE, b"moved")
        with pytest.raises(NotFoundError):
            await two.lookup(ROOT_INODE, b"file")
        assert (await two.lookup(ROOT_INODE, b"moved")).ino == file.ino
        assert (await two.attributes(ROOT_INODE)).size == 1
        await two.remove(ROOT_INODE, b"moved", directory=False)
        with pytest.raises(NotFoundError):
            await one.lookup(ROOT_INODE, b"moved")
        await file.close()


async def test_a_directory_known_wholly_learns_of_other_clients_names(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        made = await one.create_node(ROOT_INODE, b"d", NodeKind.DIRECTORY, mode=0o755, uid=0, gid=0)
        directory = made.attributes.ino
        with pytest.raises(NotFoundError):
            await one.lookup(directory, b"theirs")
        theirs = await create(two, b"theirs", parent=directory)
        assert (await one.lookup(directory, b"theirs")).ino == theirs.ino
        names = [entry.name for entry in (await one.read_directory(directory)).entries]
        assert names == [b"theirs"]
        with pytest.raises(NotFoundError):
            await one.lookup(directory, b"listed: not there")
        await create(two, b"later", parent=directory)
        assert (await one.lookup(directory, b"later")).size == 0


async def test_disjoint_writes_into_one_block_both_survive(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("local") as one,
        cluster.client("tcp") as two,
    ):
        file = await create(one)
        await file.write(0, b"." * BLOCK)
        await file.flush()
        other = await open_by_name(two)
        await file.write(10, b"one")
        await other.write(20, b"two")
        await file.write(BLOCK + 10, b"ONE")
        await other.write(BLOCK + 20, b"TWO")
        await file.flush()
        await other.flush()
        await file.write(30, b"again")
        await file.flush()
        expected = bytearray(b"." * BLOCK + bytes(23))
        expected[10:13], expected[20:23], expected[30:35] = b"one", b"two", b"again"
        expected[BLOCK + 10 : BLOCK + 13], expected[BLOCK + 20 :] = b"ONE", b"TWO"
        assert await content(file) == expected
        assert await content(other) == expected
        await file.close()
        await other.close()


@pytest.mark.parametrize("seed", range(3))
async def test_many_disjoint_writes_at_once(tmp_path: Path, seed: int) -> None:
    """Each client owns every other 1,000 bytes, and they commit whenever they like."""
    expected = bytearray(4 * BLOCK)

    async def write(client: FileSystem, number: int) -> None:
        chance = random.Random(seed * 2 + number)
        file = await open_by_name(client)
        for _ in range(30):
            slot = chance.randrange(len(expected) // 2000) * 2000 + number * 1000
            data = chance.randbytes(1000)
            await file.write(slot, data)
            expected[slot : slot + 1000] = data
            if chance.random() < 0.3:
                await file.flush()
        await file.close()

    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("local") as one,
        cluster.client("tcp") as two,
    ):
        file = await create(one)
        await file.truncate(len(expected))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, one, 0)
            nursery.start_soon(write, two, 1)
        assert await content(file) == expected, f"seed {seed}"
        assert await content(await open_by_name(two)) == expected, f"seed {seed}"
        await file.close()


async def test_truncate_by_the_other_client_while_writing(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        file = await create(one)
        await file.write(0, b"x" * 1000)
        await file.flush()
        await file.write(2000, b"tail")
        await two.set_attributes(file.ino, size=10)
        await file.flush()
        assert await content(file) == b"x" * 10 + bytes(1990) + b"tail", "cut bytes stay cut"
        await file.write(0, b"y")
        await two.set_attributes(file.ino, size=0)
        await file.close()
        assert await content(await open_by_name(two)) == b"y"


async def test_unlinked_while_open_at_the_other_client(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        file = await create(one, storage_class=MEMORY_ONLY)
        await file.write(0, b"still here" * BLOCK)
        await file.close()
        free = await free_blocks(one)
        reader = await open_by_name(two)
        await one.remove(ROOT_INODE, b"file", directory=False)
        with pytest.raises(NotFoundError):
            await two.lookup(ROOT_INODE, b"file")
        assert bytes(await reader.read(0, 10)) == b"still here"
        await reader.write(0, b"STILL")
        await reader.flush()
        assert bytes(await reader.read(0, 10)) == b"STILL here"
        assert (await two.attributes(reader.ino)).nlink == 0
        await reader.close()
        with pytest.raises(StaleError):
            await one.attributes(reader.ino)
        assert await free_blocks(one) >= free + 10 - 16


async def test_unlinked_while_open_here(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client)
        await file.write(0, b"gone but open")
        await client.remove(ROOT_INODE, b"file", directory=False)
        assert await content(file) == b"gone but open"
        again = await client.open(file.ino)
        await file.close()
        assert await content(again) == b"gone but open"
        await again.close()
        with pytest.raises(StaleError):
            await client.attributes(file.ino)


async def test_writing_to_a_file_that_is_gone(tmp_path: Path) -> None:
    """Not open, so nobody kept it: the number alone is stale."""
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        ino = (await create(one)).ino
    async with running_cluster(tmp_path) as cluster, cluster.client() as two:
        await two.remove(ROOT_INODE, b"file", directory=False)
        with pytest.raises(StaleError):
            await two.open(ino)


async def test_renaming_over_a_file_that_the_other_client_reads(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        for name in (b"old", b"new"):
            file = await create(one, name)
            await file.write(0, name)
            await file.close()
        reader = await open_by_name(two, b"old")
        await one.rename(ROOT_INODE, b"new", ROOT_INODE, b"old")
        assert await content(reader) == b"old"
        assert await content(await open_by_name(two, b"old")) == b"new"
        assert await content(await open_by_name(one, b"old")) == b"new"
        with pytest.raises(NotFoundError):
            await one.lookup(ROOT_INODE, b"new")
        await reader.close()


async def test_exchange_and_links(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        a = await create(client, b"a")
        b = await create(client, b"b")
        await client.rename(ROOT_INODE, b"a", ROOT_INODE, b"b", RenameFlag.EXCHANGE)
        assert (await client.lookup(ROOT_INODE, b"a")).ino == b.ino
        assert (await client.lookup(ROOT_INODE, b"b")).ino == a.ino
        assert (await client.link(a.ino, ROOT_INODE, b"c")).nlink == 2
        await client.rename(ROOT_INODE, b"b", ROOT_INODE, b"c")
        assert (await client.lookup(ROOT_INODE, b"b")).ino == a.ino, "the same file: nothing to do"
        await client.remove(ROOT_INODE, b"b", directory=False)
        assert (await client.lookup(ROOT_INODE, b"c")).nlink == 1
        assert (await client.attributes(ROOT_INODE)).size == 2


async def test_the_kernel_is_told_before_the_change_is_acknowledged(tmp_path: Path) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client() as one,
        cluster.client() as two,
    ):
        file = await create(one)
        await two.lookup(ROOT_INODE, b"file")
        told: list[Invalidation] = []
        proceed = trio.Event()
        heard = trio.Event()
        acknowledged = trio.Event()

        async def on_invalidate(entries: tuple[Invalidation, ...]) -> None:
            told.extend(entries)
            heard.set()
            await proceed.wait()

        two.on_invalidate = on_invalidate

        async def change() -> None:
            await one.set_attributes(file.ino, mode=0o600)
            acknowledged.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await heard.wait()
            assert not acknowledged.is_set()
            proceed.set()
        assert Invalidation(file.ino, b"", False) in told
        await file.close()


async def test_what_is_opened_while_it_is_removed_can_be_read_or_is_gone(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client)
        await file.write(0, b"here")
        await file.close()
        await client.lookup(ROOT_INODE, b"file")
        await client.attributes(file.ino)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(client.remove, ROOT_INODE, b"file", directory=False))
            while client.cached_attributes(file.ino) and not client._said_not_open:
                await trio.lowlevel.checkpoint()  # until the request is on its way
            with pytest.raises(StaleError):
                await client.open(file.ino)  # it would promise bytes that are going


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[DiskMedium]:
    """The disk region, once for each flush."""
    flushes: list[DiskMedium] = []
    flush = DiskMedium.flush

    async def noted(medium: DiskMedium) -> bool:
        flushes.append(medium)
        return await flush(medium)

    monkeypatch.setattr(DiskMedium, "flush", noted)
    return flushes


@pytest.mark.parametrize("writer", ["this client, before it opened the file anew", "another"])
async def test_fsync_flushes_what_was_written_through_other_handles(
    tmp_path: Path, writer: str, flushed: list[DiskMedium]
) -> None:
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("tcp") as here,
        cluster.client("tcp") as elsewhere,
    ):
        writing = elsewhere if writer == "another" else here
        file = await create(writing, storage_class=DISK_ONLY)
        await file.write(0, b"to be kept")
        await file.close()
        assert not flushed
        again = await open_by_name(here)
        await again.fsync()
        assert len(flushed) == 1
        await again.fsync()
        assert len(flushed) == 1, "nothing has changed since"
        await again.write(0, b"and more")
        await again.fsync()
        assert len(flushed) == 2
        await again.fsync()
        assert len(flushed) == 2, "that commit was our own"
        await again.close()


async def test_fsync_of_a_file_with_more_extents_than_a_client_reads_at_once(
    tmp_path: Path, flushed: list[DiskMedium], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_extents, "EXTENT_PAGE_MAX", 1)
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("tcp") as writing,
        cluster.client("tcp") as syncing,
    ):
        file = await create(writing, storage_class=DISK_ONLY)
        for fragment in range(70):
            await file.write(2 * fragment * BLOCK, b"x")
        await file.truncate(FILE_SIZE_MAX_BYTES)
        await file.close()
        assert len(await syncing.extents(file.ino)) == 70
        again = await open_by_name(syncing)
        await again.fsync()
        assert len(flushed) == 1
        await again.close()


async def test_fsync_flushes_what_it_merged_before_it_commits_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    flush, write = DiskMedium.flush, DiskMedium.try_write

    async def noted_flush(medium: DiskMedium) -> bool:
        events.append("flush")
        return await flush(medium)

    def noted_write(medium: DiskMedium, offset: int, data: memoryview) -> bool:
        events.append("write")
        return write(medium, offset, data)

    monkeypatch.setattr(DiskMedium, "flush", noted_flush)
    monkeypatch.setattr(DiskMedium, "try_write", noted_write)
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("tcp") as first,
        cluster.client("tcp") as second,
    ):
        file = await create(first, storage_class=DISK_ONLY)
        await file.write(0, b"." * 30)
        await file.flush()
        other = await open_by_name(second)
        await file.write(0, b"first")
        await other.write(10, b"second")
        await other.close()
        events.clear()
        await file.fsync()
        assert await content(file) == b"first....." + b"second" + b"." * 14
        assert events.count("write") == 2, "what it had written, and that merged"
        assert events[-1] == "flush"
        await file.close()
