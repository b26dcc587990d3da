"""A cluster loses its metadata server's state; its files come back from the regions."""

from __future__ import annotations

import random
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from crailfs.cli import fsck_salvage
from crailfs.cli.exit_codes import ExitCode
from crailfs.cli.main import error_of
from crailfs.client.filesystem import FileSystem
from crailfs.errors import ChecksumError, NoSpaceError
from crailfs.pmem import libpmem, libpmemobj
from crailfs.records import Tier
from crailfs.units import MIB, ROOT_INODE
from tests.salvage.cluster import SalvageCluster, create, names, read, salvage_cluster, write
from tests.support.cluster import BLOCK_SIZE_BYTES

_without_pmem = libpmem.missing() or libpmemobj.missing()
needs_pmem = pytest.mark.skipif(_without_pmem is not None, reason=str(_without_pmem))
MEDIA = [
    pytest.param((Tier.PMEM,), marks=needs_pmem, id="pmem"),
    pytest.param((Tier.NVME,), id="nvme"),
]
TOGETHER = [
    pytest.param((Tier.PMEM, Tier.PMEM), marks=needs_pmem, id="pmem-pmem"),
    pytest.param((Tier.PMEM, Tier.NVME), marks=needs_pmem, id="pmem-nvme"),
]


async def make_files(fs: FileSystem, dice: random.Random) -> dict[int, bytes]:
    """All kinds of histories. What is to be found again: inode -> bytes (of a hole at the end,
    which no block tells of, nothing)."""
    expected = {}
    block = BLOCK_SIZE_BYTES
    for size in (1, block - 1, block, block + 1, 3 * block + 17, 5 * MIB):
        data = dice.randbytes(size)
        ino = await create(fs, b"size-%d" % size)
        await write(fs, ino, (0, data))
        expected[ino] = data
    await create(fs, b"empty")

    ino = await create(fs, b"sparse")
    pieces = [(offset, dice.randbytes(5_000)) for offset in (3 * block, 10 * block + 9)]
    await write(fs, ino, *pieces)
    sparse = bytearray(pieces[-1][0] + 5_000)
    for offset, data in pieces:
        sparse[offset : offset + 5_000] = data
    expected[ino] = bytes(sparse)

    ino = await create(fs, b"overwritten")
    first, second = dice.randbytes(6 * block), dice.randbytes(2 * block)
    await write(fs, ino, (0, first), (block + 100, second))
    expected[ino] = first[: block + 100] + second + first[3 * block + 100 :]

    ino = await create(fs, b"cut")
    data = dice.randbytes(6 * block)
    await write(fs, ino, (0, data), cut=2 * block + 1_000)
    expected[ino] = data[: 2 * block + 1_000]

    ino = await create(fs, b"cut and grown")
    await write(fs, ino, (0, data), cut=block + 1_000)
    await write(fs, ino, (4 * block, b"end"))
    expected[ino] = data[: block + 1_000].ljust(4 * block, b"\0") + b"end"

    ino = await create(fs, b"renamed")
    await write(fs, ino, (0, b"renamed"))
    await fs.rename(ROOT_INODE, b"renamed", ROOT_INODE, b"has another name")
    expected[ino] = b"renamed"

    ino = await create(fs, b"linked")
    await write(fs, ino, (0, b"linked"))
    await fs.link(ino, ROOT_INODE, b"second name")
    await fs.remove(ROOT_INODE, b"linked", directory=False)
    expected[ino] = b"linked"

    for name in (b"removed", b"replaced"):
        ino = await create(fs, name)
        await write(fs, ino, (0, dice.randbytes(3 * block)))
    await fs.remove(ROOT_INODE, b"removed", directory=False)
    ino = await create(fs, b"new")
    await write(fs, ino, (0, b"what replaces"))
    await fs.rename(ROOT_INODE, b"new", ROOT_INODE, b"replaced")
    expected[ino] = b"what replaces"
    return expected


async def salvage(cluster: SalvageCluster, *, verify: bool = True) -> int:
    return await fsck_salvage.salvage_files(cluster.client_config(), verify)


@pytest.mark.parametrize("tiers", MEDIA + TOGETHER)
async def test_every_file_comes_back(
    tmp_path: Path, tiers: tuple[Tier, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    # What two tiers have does not fit into one of them.
    region_bytes = 6 * MIB if len(tiers) > 1 else 24 * MIB
    async with salvage_cluster(tmp_path, *tiers, region_bytes=region_bytes) as cluster:
        async with cluster.client() as fs:
            expected = await make_files(fs, random.Random(1))
        await cluster.headers_followed()
        await cluster.lose_name_space()

        regions = (await cluster.status()).cluster.regions
        assert any(placed.unclaimed for placed in regions)
        assert sum(placed.info.held_blocks for placed in regions) == sum(
            len({at // BLOCK_SIZE_BYTES for at in _written(data)}) for data in expected.values()
        )
        assert await salvage(cluster) == ExitCode.OK
        assert f"{len(expected)} files" in capsys.readouterr().out
        assert not any(placed.unclaimed for placed in (await cluster.status()).cluster.regions)
        await cluster.headers_followed()

        async with cluster.client() as fs:
            folder = await fs.lookup(ROOT_INODE, b"lost+found")
            assert stat.S_IMODE(folder.st_mode) == 0o700
            found = await names(fs, folder.ino)
            assert found == {b"inode-%d" % ino: ino for ino in expected}
            for ino, data in expected.items():
                assert await read(fs, ino) == data, f"inode {ino}"
            # And the file system is one like any other again.
            ino = await create(fs, b"after")
            assert ino > max(expected)
            await write(fs, ino, (0, b"after" * 100_000))
            assert await read(fs, ino) == b"after" * 100_000
            for name in found:
                await fs.remove(folder.ino, name, directory=False)
        await cluster.headers_followed()
        counts = await cluster.audit()
        assert counts.findings == () and counts.counts["owned_blocks"] == 8
        # Nothing of what was removed is found the next time.
        await cluster.lose_name_space()
        assert await salvage(cluster) == ExitCode.OK
        async with cluster.client() as fs:
            folder = await fs.lookup(ROOT_INODE, b"lost+found")
            assert await names(fs, folder.ino) == {b"inode-%d" % ino: ino}
            assert await read(fs, ino) == b"after" * 100_000
        assert (await cluster.audit()).findings == ()


def _written(data: bytes) -> range | list[int]:
    """Offsets in all blocks that are not a hole."""
    starts = range(0, len(data), BLOCK_SIZE_BYTES)
    return [at for at in starts if any(data[at : at + BLOCK_SIZE_BYTES])]


@pytest.mark.parametrize("tiers", MEDIA)
async def test_a_damaged_block_is_named_and_never_zeros(
    tmp_path: Path, tiers: tuple[Tier, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    marks = {block: b"block %d of the damaged file." % block for block in range(4)}
    data = b"".join(mark.ljust(BLOCK_SIZE_BYTES, b".") for mark in marks.values())
    async with salvage_cluster(tmp_path, *tiers) as cluster:
        async with cluster.client() as fs:
            ino = await create(fs, b"file")
            await write(fs, ino, (0, data))
            other = await create(fs, b"other")
            await write(fs, other, (0, b"whole"))
        await cluster.headers_followed()
        await cluster.storage.stop()
        path = cluster.storage_config.regions[0].path
        content = path.read_bytes()
        at = content.index(marks[2])
        with path.open("r+b") as region:
            region.seek(at)
            region.write(b"X")
        await cluster.start_storage()
        await cluster.lose_name_space()
        assert await salvage(cluster) == ExitCode.DAMAGED
        said = capsys.readouterr().out
        assert f"/lost+found/inode-{ino}: 1 of 4 blocks" in said and "file blocks 2\n" in said
        assert f"inode-{other}" not in said
        async with cluster.client() as fs, await fs.open(ino) as file:
            assert await file.read(0, 2 * BLOCK_SIZE_BYTES) == data[: 2 * BLOCK_SIZE_BYTES]
            assert await file.read(3 * BLOCK_SIZE_BYTES, 99) == data[3 * BLOCK_SIZE_BYTES :][:99]
            with pytest.raises(ChecksumError):
                await file.read(2 * BLOCK_SIZE_BYTES, 10)
            assert await read(fs, other) == b"whole"
        assert (await cluster.audit()).findings == ()


@pytest.mark.parametrize("tiers", MEDIA)
async def test_a_salvage_that_is_interrupted_can_be_run_again(
    tmp_path: Path, tiers: tuple[Tier, ...]
) -> None:
    """At every request to the metadata server: it is answered and the salvage dies."""
    async with salvage_cluster(tmp_path, *tiers) as cluster:
        expected = {}
        async with cluster.client() as fs:
            for number in range(4):
                ino = await create(fs, b"%d" % number)
                expected[ino] = b"%d" % number * BLOCK_SIZE_BYTES * 2
                await write(fs, ino, (0, expected[ino]))
        await cluster.headers_followed()
        await cluster.lose_name_space()
        deaths = 0
        while True:
            with trio.CancelScope() as scope:
                await _dying_after(deaths + 1, scope, lambda: salvage(cluster))
            assert (await cluster.audit()).findings == ()
            if not scope.cancelled_caught:
                break
            deaths += 1
        assert deaths >= 6, "begin, four files, end"
        async with cluster.client() as fs:
            for ino, data in expected.items():
                assert await read(fs, ino) == data
        assert (await cluster.audit()).findings == ()


async def _dying_after(
    call_count: int, scope: trio.CancelScope, salvage: Callable[[], Awaitable[int]]
) -> None:
    from crailfs.net.client import RpcClient
    from crailfs.wire.messages import BeginSalvage, EndSalvage, SalvageFile

    original = RpcClient.call
    left = call_count

    async def call(self, opcode, request, **more):  # type: ignore[no-untyped-def]
        nonlocal left
        reply = await original(self, opcode, request, **more)
        if isinstance(request, BeginSalvage | SalvageFile | EndSalvage):
            left -= 1
            if not left:
                scope.cancel()
                await trio.lowlevel.checkpoint()
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RpcClient, "call", call)
        assert await salvage() == ExitCode.OK


@pytest.mark.parametrize("tiers", MEDIA)
async def test_unclaimed_blocks_are_never_written_to_and_can_be_discarded(
    tmp_path: Path, tiers: tuple[Tier, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    async with salvage_cluster(tmp_path, *tiers) as cluster:
        async with cluster.client() as fs:
            ino = await create(fs, b"file")
            await write(fs, ino, (0, b"x" * 300_000))
        await cluster.headers_followed()
        await cluster.lose_name_space()
        async with cluster.client() as fs:
            ino = await create(fs, b"file")
            with pytest.raises(NoSpaceError, match="--salvage"):
                await write(fs, ino, (0, b"y"))
        with pytest.raises(ExceptionGroup) as refused:
            await salvage(cluster)
        assert "has been used" in str(error_of(refused.value))
        assert await fsck_salvage.discard(cluster.client_config()) == ExitCode.OK
        await cluster.headers_followed()
        assert await fsck_salvage.discard(cluster.client_config()) == ExitCode.OK
        assert "no region holds blocks" in capsys.readouterr().out
        async with cluster.client() as fs:
            await write(fs, ino, (0, b"y" * 300_000))
            assert await read(fs, ino) == b"y" * 300_000
        assert (await cluster.audit()).findings == ()
