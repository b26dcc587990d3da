"""One client: what is written is read, however it was written; nothing else ever is."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from crailfs.client.grants import merge_runs
from crailfs.errors import (
    ChecksumError,
    InvalidError,
    IsADirectoryCrailError,
    NotFoundError,
    TooLargeError,
)
from crailfs.limits import EXTENT_BLOCKS_MAX, FILE_SIZE_MAX_BYTES
from crailfs.net.sending import Buffer
from crailfs.records import NodeKind, Run
from crailfs.transports.tcp import TcpTransport
from crailfs.units import MIB, ROOT_INODE
from tests.client.helpers import (
    BLOCK,
    DISK_ONLY,
    MEMORY_ONLY,
    content,
    create,
    free_blocks,
    open_by_name,
    overwrite_everywhere,
)
from tests.support.cluster import running_cluster

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "tcp"])


@TRANSPORTS
async def test_written_bytes_are_read_before_and_after_the_commit(
    tmp_path: Path, transport: str
) -> None:
    data = random.Random(1).randbytes(5 * BLOCK + 1234)
    async with running_cluster(tmp_path) as cluster, cluster.client(transport) as client:
        file = await create(client)
        await file.write(0, data)
        assert file.attributes.size == len(data)
        assert await content(file) == data
        await file.flush()
        assert await content(file) == data
        await file.close()
        again = await open_by_name(client)
        assert bytes(await again.read(BLOCK - 5, 10)) == data[BLOCK - 5 : BLOCK + 5]
        assert bytes(await again.read(len(data) - 3, 100)) == data[-3:]
        assert bytes(await again.read(len(data), 100)) == b""
        assert bytes(await again.read(1 << 40, 100)) == b""


@TRANSPORTS
@pytest.mark.parametrize("seed", range(4))
async def test_random_writes_and_truncates(tmp_path: Path, transport: str, seed: int) -> None:
    chance = random.Random(seed)
    model = bytearray()
    async with running_cluster(tmp_path) as cluster, cluster.client(transport) as client:
        file = await create(client, storage_class=chance.choice((MEMORY_ONLY, DISK_ONLY, None)))
        for step in range(60):
            offset = chance.choice((0, len(model), chance.randrange(8 * BLOCK)))
            length = chance.choice((1, 100, 4096, BLOCK, 2 * BLOCK + 7, BLOCK - offset % BLOCK))
            action = chance.random()
            if action < 0.6:
                data = chance.randbytes(length)
                await file.write(offset, data)
                model.extend(bytes(max(0, offset + length - len(model))))
                model[offset : offset + length] = data
            elif action < 0.75:
                await file.truncate(offset)
                model[offset:] = bytes(max(0, offset - len(model)))
            elif action < 0.85:
                await file.flush()
            else:
                await file.close()
                file = await open_by_name(client)
            assert file.attributes.size == len(model), f"seed {seed}, step {step}"
            got = bytes(await file.read(offset, length))
            assert got == model[offset : offset + length], f"seed {seed}, step {step}"
        assert await content(file) == model, f"seed {seed}"
        await file.close()
        async with cluster.client("tcp" if transport == "local" else "local") as other:
            assert await content(await open_by_name(other)) == model, f"seed {seed}"


@TRANSPORTS
async def test_holes_and_tails_are_zeros_even_where_others_data_lay(
    tmp_path: Path, transport: str
) -> None:
    async with (
        running_cluster(tmp_path, memory_bytes=2 * MIB, disk_bytes=2 * MIB) as cluster,
        cluster.client(transport) as client,
    ):
        secret = await create(client, b"secret", storage_class=MEMORY_ONLY)
        free = await free_blocks(client)
        await secret.write(0, b"\xaa" * (1 * MIB))
        await secret.close()
        await client.remove(ROOT_INODE, b"secret", directory=False)

        file = await create(client, storage_class=MEMORY_ONLY)
        await file.write(10, b"x")
        await file.write(3 * BLOCK + 5, b"y")
        await file.write(5 * BLOCK - 1, b"z")
        await file.truncate(8 * BLOCK)
        expected = bytearray(8 * BLOCK)
        expected[10], expected[3 * BLOCK + 5], expected[5 * BLOCK - 1] = b"xyz"
        assert await content(file) == expected
        await file.close()
        file = await open_by_name(client)
        assert await content(file) == expected
        assert file.attributes.block_count == 3, "holes take no space"
        await file.truncate(11)
        await file.truncate(BLOCK)
        assert await content(file) == bytes(10) + b"x" + bytes(BLOCK - 11)
        await file.write(BLOCK - 1, b"!")
        assert await content(file) == bytes(10) + b"x" + bytes(BLOCK - 12) + b"!"
        await file.close()
        await client.remove(ROOT_INODE, b"file", directory=False)
        assert await free_blocks(client) >= free - 16 * 2, "only the pools hold blocks"


async def test_truncating_what_is_not_committed(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client)
        await file.write(0, b"a" * (3 * BLOCK))
        await file.truncate(BLOCK + 10)
        assert file.attributes.size == BLOCK + 10
        await file.write(BLOCK + 20, b"b")
        expected = b"a" * (BLOCK + 10) + bytes(10) + b"b"
        assert await content(file) == expected
        await file.close()
        assert await content(await open_by_name(client)) == expected


async def test_append_goes_to_the_live_end(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        one = await create(client)
        two = await client.open(one.ino)
        assert await one.append(b"abc") == 0
        assert await two.append(b"def") == 3
        await one.close()
        assert await two.append(b"ghi") == 6
        assert await content(two) == b"abcdefghi"
        await two.close()


async def test_handles_of_one_client_share_what_is_not_committed(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        writer = await create(client)
        reader = await client.open(writer.ino)
        await writer.write(0, b"now")
        assert await content(reader) == b"now"
        assert (await client.attributes(writer.ino)).size == 3
        listed = (await client.read_directory(ROOT_INODE)).entries[0].attributes
        assert (listed.size, listed.block_count) == (3, 1)
        await reader.close()
        await writer.close()


async def test_a_damaged_block_is_an_error_and_never_data(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(2 * BLOCK)
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client, storage_class=MEMORY_ONLY)
        await file.write(0, data)
        await file.flush()
        mark = data[BLOCK + 100 : BLOCK + 132]
        assert overwrite_everywhere(cluster.memory_path, mark, bytes(32)) == 1
        with pytest.raises(ChecksumError):
            await file.read(BLOCK, 10)
        with pytest.raises(ChecksumError):
            await file.write(BLOCK, b"copy on write must not launder it")
        assert bytes(await file.read(0, BLOCK)) == data[:BLOCK], "the other block is good"
        await file.write(BLOCK, bytes(BLOCK))
        assert bytes(await file.read(BLOCK, BLOCK)) == bytes(BLOCK), "a new block can be written"
        await file.close()


async def test_explicit_times_survive_the_commit(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client)
        await file.write(0, b"data")
        await client.set_attributes(file.ino, mtime_ns=12_345)
        assert file.attributes.mtime_ns == 12_345
        await file.close()
        assert (await client.attributes(file.ino)).mtime_ns == 12_345
        file = await client.open(file.ino)
        await file.write(0, b"more")
        assert file.attributes.mtime_ns > 12_345
        await file.close()


async def test_fsync_of_a_file_with_and_without_changes(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client, storage_class=DISK_ONLY)
        await file.write(0, b"durable")
        await file.fsync()
        await file.fsync()
        async with cluster.client() as other:
            assert await content(await open_by_name(other)) == b"durable"
        await file.close()


async def test_what_cannot_be_opened(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        with pytest.raises(IsADirectoryCrailError):
            await client.open(ROOT_INODE)
        fifo = await client.create_node(
            ROOT_INODE, b"fifo", NodeKind.FIFO, mode=0o644, uid=0, gid=0
        )
        with pytest.raises(InvalidError):
            await client.open(fifo.attributes.ino)
        file = await create(client)
        with pytest.raises(TooLargeError):
            await file.write(FILE_SIZE_MAX_BYTES, b"x")
        await file.close()
        with pytest.raises(InvalidError):
            await file.read(0, 1)


async def test_opening_with_truncate(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        file = await create(client)
        await file.write(0, b"old" * BLOCK)
        await file.close()
        file = await client.open(file.ino, truncate=True)
        assert await content(file) == b""
        await file.write(0, b"new")
        await file.close()
        assert await content(await open_by_name(client)) == b"new"


async def test_leaving_the_client_commits_open_files(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        async with cluster.client() as client:
            file = await create(client)
            await file.write(0, b"kept")
        async with cluster.client() as client:
            assert await content(await open_by_name(client)) == b"kept"


async def test_names_are_answered_from_the_cache(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster, cluster.client() as client:
        await (await create(client, b"there")).close()
        directory = await client.create_node(
            ROOT_INODE, b"new", NodeKind.DIRECTORY, mode=0o755, uid=0, gid=0
        )
        await client.lookup(ROOT_INODE, b"there")
        await client.attributes(ROOT_INODE)
        await cluster.metadata.stop()
        try:
            with pytest.raises(NotFoundError):
                await client.lookup(directory.attributes.ino, b"a directory made here is known")
            assert (await client.lookup(ROOT_INODE, b"there")).kind is NodeKind.FILE
            assert client.cached_attributes(ROOT_INODE) is not None
            assert client.lease_remaining_ms(ROOT_INODE) > 0
        finally:
            await cluster.start_metadata()


@pytest.mark.parametrize("seed", range(3))
async def test_reading_ahead_never_shows_old_bytes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    model = bytearray(chance.randbytes(5 * MIB))
    async with (
        running_cluster(tmp_path) as cluster,
        cluster.client("tcp") as client,
        cluster.client("local") as other,
    ):
        file = await create(client)
        await file.write(0, model)
        await file.flush()
        theirs = await open_by_name(other)
        position = 0
        while position < len(model):
            count = chance.choice((4096, 100_000, MIB, 3 * MIB // 2))
            got = bytes(await file.read(position, count))
            assert got == model[position : position + count], f"seed {seed}, at {position}"
            position += len(got)
            ahead = min(position + chance.randrange(MIB), len(model) - 10)
            writer = chance.choice((file, file, theirs))
            await writer.write(ahead, b"0123456789")
            model[ahead : ahead + 10] = b"0123456789"
            if writer is theirs:
                await writer.flush()
        assert bytes(await file.read(position, 10)) == b""
        await file.close()
        await theirs.close()


async def test_values_of_tables_use_no_more_space_than_they_need(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        async with cluster.client() as client:
            free = await free_blocks(client)
            table = await client.create_node(
                ROOT_INODE, b"t", NodeKind.TABLE, mode=0o755, uid=0, gid=0
            )
            for size in (10, 3 * BLOCK + 1, 0, BLOCK):
                attributes = await client.put_key_value(
                    table.attributes.ino, b"k", b"v" * size, mode=0o644, uid=0, gid=0
                )
                assert attributes.block_count == -(-size // BLOCK)
        async with cluster.client() as client:
            assert await free_blocks(client) == free - 1


async def test_neighbouring_blocks_go_in_one_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one grant are written so, whatever was taken ahead; and as many as an extent may
    have are read so, whatever was granted and committed together."""
    written: list[Run] = []
    read_blocks: list[int] = []
    write, read = TcpTransport.write, TcpTransport.read

    async def noted_write(
        transport: TcpTransport, region: int, offset: int, generation: int, data: Buffer
    ) -> None:
        written.append(Run(region, offset // BLOCK, len(data) // BLOCK, generation))
        await write(transport, region, offset, generation, data)

    async def noted_read(
        transport: TcpTransport, region: int, offset: int, byte_count: int
    ) -> Buffer:
        read_blocks.append(byte_count // BLOCK)
        return await read(transport, region, offset, byte_count)

    monkeypatch.setattr(TcpTransport, "write", noted_write)
    monkeypatch.setattr(TcpTransport, "read", noted_read)
    monkeypatch.setattr(TcpTransport, "write_piece_bytes", 64 * MIB)
    async with (
        running_cluster(tmp_path, memory_bytes=64 * MIB) as cluster,
        cluster.client("tcp") as client,
    ):
        file = await create(client)
        data = random.Random(1).randbytes(600 * BLOCK)
        for begin, end in itertools.pairwise((0, 5, 30, 100, 101, 300, 310, 500, 600)):
            written.clear()
            await file.write(begin * BLOCK, data[begin * BLOCK : end * BLOCK])
            await file.flush()
            assert sum(run.block_count for run in written) == end - begin
            assert len(merge_runs(written)) == len(written)
        # There was nothing but this file to take blocks: all follow each other.
        for begin in range(0, 600, EXTENT_BLOCKS_MAX):
            end = min(begin + EXTENT_BLOCKS_MAX, 600)
            read_blocks.clear()
            data_read = await file.read(begin * BLOCK, (end - begin) * BLOCK)
            assert data_read == data[begin * BLOCK : end * BLOCK]
            assert read_blocks == [end - begin]
        read_blocks.clear()
        assert await file.read(0, 600 * BLOCK) == data
        assert max(read_blocks) <= EXTENT_BLOCKS_MAX
        await file.close()
