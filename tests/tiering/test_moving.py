"""Blocks move between memory and disk; programs notice nothing. The mover is driven by the test."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from crailfs.client.filesystem import FileSystem
from crailfs.client.open_file import OpenFile
from crailfs.client.session import Session
from crailfs.errors import ChecksumError, UnavailableError
from crailfs.records import StorageClass, Tier
from crailfs.units import MIB, ROOT_INODE
from crailfs.wire.messages import Message, Opcode
from tests.client.helpers import (
    DISK_ONLY,
    MEMORY_ONLY,
    content,
    create,
    eventually,
    overwrite_everywhere,
)
from tests.tiering.moving import (
    BLOCK,
    blocks_by_tier,
    stepped_mover,
    tiered_cluster,
    used_blocks,
)

pytestmark = pytest.mark.timeout(60)

MEMORY_BLOCKS = 4 * MIB // BLOCK
HIGH_BLOCKS = int(MEMORY_BLOCKS * 0.9)
LOW_BLOCKS = int(MEMORY_BLOCKS * 0.8)
MEMORY_FIRST = StorageClass(Tier.MEMORY, Tier.DISK)
FILE_BLOCKS = 4


def bytes_of(number: int, block_count: int = FILE_BLOCKS) -> bytes:
    return b"".join(b"%8d/%7d" % (number, index) * (BLOCK // 16) for index in range(block_count))


async def write_files(
    client: FileSystem, count: int, *, storage_class: StorageClass = MEMORY_FIRST, first: int = 0
) -> list[OpenFile]:
    files = []
    for number in range(first, first + count):
        file = await create(client, b"file-%d" % number, storage_class=storage_class)
        await file.write(0, bytes_of(number))
        await file.flush()
        files.append(file)
    return files


async def check(files: list[OpenFile], *, first: int = 0) -> None:
    for number, file in enumerate(files, first):
        assert await content(file) == bytes_of(number), f"file {number}"


async def test_a_full_tier_is_emptied_down_to_the_low_water_mark(tmp_path: Path) -> None:
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        assert await used_blocks(client, Tier.MEMORY) > HIGH_BLOCKS
        attributes = [await client.attributes(file.ino) for file in files]
        await mover.settle()
        used = await used_blocks(client, Tier.MEMORY)
        assert LOW_BLOCKS - FILE_BLOCKS < used <= LOW_BLOCKS
        assert mover.counters["demoted_bytes"] >= (HIGH_BLOCKS - LOW_BLOCKS) * BLOCK
        await check(files)
        for before, file in zip(attributes, files, strict=True):
            after = await client.attributes(file.ino)
            assert (after.mtime_ns, after.ctime_ns, after.data_version, after.block_count) == (
                before.mtime_ns,
                before.ctime_ns,
                before.data_version,
                before.block_count,
            )
        await mover.settle()
        assert await used_blocks(client, Tier.MEMORY) == used, "below high water nothing moves"


async def test_what_is_pinned_or_of_one_tier_stays(tmp_path: Path) -> None:
    async with (
        tiered_cluster(tmp_path, memory_bytes=16 * MIB) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        only = await write_files(client, 3, storage_class=MEMORY_ONLY)
        pinned = await write_files(client, 3, first=3)
        for file in pinned:
            await client.set_xattr(file.ino, b"user.crail.pin", b"true")
        free = await write_files(client, 58, first=6)
        for file in only + pinned:
            assert await blocks_by_tier(client, file.ino) == {Tier.MEMORY: FILE_BLOCKS}
        before = [await client.extents(file.ino) for file in only + pinned]
        await mover.settle()
        assert [await client.extents(file.ino) for file in only + pinned] == before
        assert mover.counters["demoted_bytes"] > 0
        await check(only + pinned + free)


async def test_a_hot_file_moves_up_where_there_is_room(tmp_path: Path) -> None:
    """And no further than to the low water mark; what was made durable stays where it is."""
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        hot = (await write_files(client, 1, storage_class=DISK_ONLY))[0]
        durable = (await write_files(client, 1, storage_class=DISK_ONLY, first=1))[0]
        await durable.fsync()
        for file in (hot, durable):
            await client.set_xattr(file.ino, b"user.crail.storage_class", b"memory>disk")
        # Both stay open: the client says so about once a second.
        with trio.fail_after(30):
            while not mover.counters["promoted_bytes"]:
                await mover.settle()
                await trio.sleep(0.1)
        assert await blocks_by_tier(client, hot.ino) == {Tier.MEMORY: FILE_BLOCKS}
        await mover.settle()
        assert await blocks_by_tier(client, durable.ino) == {Tier.DISK: FILE_BLOCKS}
        assert mover.counters["demoted_bytes"] == 0
        await check([hot, durable])


async def test_a_reader_with_an_old_map_reads_on(tmp_path: Path) -> None:
    """It is told to forget the map, and the old blocks are not reused before it has."""
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
        cluster.client("tcp") as remote,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        readers = [await remote.open(file.ino) for file in files]
        await check(readers)
        await mover.settle()
        assert mover.counters["demoted_bytes"] > 0
        await check(readers)
        refilled = await write_files(client, 4, first=100)
        await check(readers)
        await check(refilled, first=100)
        await check(files)


async def test_a_writer_builds_on_blocks_that_move_meanwhile(tmp_path: Path) -> None:
    """It meets a conflict, takes the bytes from where they are now, and loses none."""
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        for file in files:
            await file.write(BLOCK + 100, b"written in part")
        await mover.settle()
        assert mover.counters["demoted_bytes"] > 0
        for file in files:
            await file.flush()
        for number, file in enumerate(files):
            expected = bytearray(bytes_of(number))
            expected[BLOCK + 100 : BLOCK + 115] = b"written in part"
            assert await content(file) == expected


async def test_a_file_that_changes_while_it_is_copied_is_left_alone(tmp_path: Path) -> None:
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        mover.before_next_piece = partial(_rewrite, files)
        await mover.settle()
        assert mover.counters["move_conflicts"] > 0
        for number, file in enumerate(files):
            assert await content(file) == bytes_of(number + 1_000)


async def _rewrite(files: list[OpenFile]) -> None:
    for number, file in enumerate(files):
        await file.write(0, bytes_of(number + 1_000))
        await file.flush()


async def test_bytes_that_are_not_what_was_written_are_not_moved(tmp_path: Path) -> None:
    """Whoever reads the file hears of it; a move must not give them a good checksum."""
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        damaged = bytes_of(0)[: 2 * BLOCK]
        assert overwrite_everywhere(cluster.memory_path, damaged, b"?" * len(damaged)) == 1
        for _ in range(5):
            await mover.step()
        assert mover.counters["move_conflicts"] > 0
        assert mover.counters["demoted_bytes"] > 0
        assert await blocks_by_tier(client, files[0].ino) == {Tier.MEMORY: FILE_BLOCKS}
        for number, file in enumerate(files[1:], 1):
            assert await content(file) == bytes_of(number)
        with pytest.raises(ChecksumError):
            await content(files[0])


async def test_what_is_copied_is_moved_though_there_is_no_room_yet_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have taken, meanwhile, what was free when the metadata server named the moves."""
    grants = 0
    call = Session.call

    async def second_grant_is_put_off(
        session: Session, opcode: Opcode, request: Message, **options: int
    ) -> object:
        nonlocal grants
        grants += opcode is Opcode.GRANT_BLOCKS
        if opcode is Opcode.GRANT_BLOCKS and grants == 2:
            raise UnavailableError("blocks are being reclaimed")
        return await call(session, opcode, request, **options)

    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        files = await write_files(client, MEMORY_BLOCKS // FILE_BLOCKS - 1)
        with monkeypatch.context() as patch:
            patch.setattr(Session, "call", second_grant_is_put_off)
            with pytest.raises(UnavailableError, match="being reclaimed"):
                await mover.settle()
        assert mover.counters["demoted_bytes"] == FILE_BLOCKS * BLOCK
        await check(files)
        await mover.settle()
        assert await used_blocks(client, Tier.MEMORY) <= LOW_BLOCKS
        await check(files)


async def test_a_file_that_is_removed_while_it_is_copied(tmp_path: Path) -> None:
    async with (
        tiered_cluster(tmp_path) as cluster,
        stepped_mover(cluster) as mover,
        cluster.client() as client,
    ):
        count = MEMORY_BLOCKS // FILE_BLOCKS - 1
        for file in await write_files(client, count):
            await file.close()

        async def remove_all() -> None:
            for number in range(count):
                await client.remove(ROOT_INODE, b"file-%d" % number, directory=False)

        mover.before_next_piece = remove_all
        await mover.settle()
        assert mover.counters["demoted_bytes"] == 0
        await eventually(lambda: _nothing_is_used(client))


async def _nothing_is_used(client: FileSystem) -> bool:
    used = [await used_blocks(client, tier) for tier in (Tier.MEMORY, Tier.DISK)]
    return used == [0, 0]
