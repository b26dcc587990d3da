"""Headers make up the files that they were of, whatever is old, senseless or damaged among them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import xxhash

from crailfs.errors import DamagedError
from crailfs.limits import HEADER_PAGE_MAX
from crailfs.records import BlockHeader, Extent, Location, PlacedRegion, RegionInfo, Tier
from crailfs.salvage.files import FoundBlocks
from crailfs.salvage.regions import LostRegion
from crailfs.wire.messages import Empty, HeaderPage, Opcode, ReadBlocks, ReadHeaders
from tests.support.headers import MemoryHeaders

BLOCK = 4096
BLOCKS = 1_000


def header(block: int, ino: int, file_block: int, generation: int, **more: int) -> BlockHeader:
    values = {"stored_bytes": BLOCK, "visible_bytes": BLOCK, "checksum": block + 7} | more
    return BlockHeader(block, ino, file_block, generation, **values)


def found(*headers: BlockHeader, region: int = 3) -> FoundBlocks:
    blocks = FoundBlocks(BLOCK)
    for one in headers:
        blocks.add(region, one)
    return blocks


def checksums(*blocks: int) -> bytes:
    return b"".join((block + 7).to_bytes(8, "little") for block in blocks)


def test_neighbours_become_one_extent() -> None:
    blocks = found(
        header(12, 5, 2, 9, stored_bytes=100, visible_bytes=60),
        header(10, 5, 0, 9),
        header(11, 5, 1, 9),
        header(40, 6, 7, 9),
    )
    first, second = blocks.files()
    assert first.extents == (Extent(0, 3, 100, 60, (Location(3, 10, 9),), checksums(10, 11, 12)),)
    assert (first.ino, first.size_bytes, first.block_count) == (5, 2 * BLOCK + 60, 3)
    assert (second.ino, second.size_bytes) == (6, 8 * BLOCK), "what is before it is a hole"
    assert (blocks.next_ino, blocks.next_generation) == (7, 10)


@pytest.mark.parametrize(
    "changed",
    [{"generation": 8}, {"block": 20}, {"file_block": 2}, {"ino": 6}],
)
def test_what_does_not_continue_begins_anew(changed: dict[str, int]) -> None:
    second = {"block": 11, "ino": 5, "file_block": 1, "generation": 9} | changed
    files = list(found(header(10, 5, 0, 9), header(**second)).files())
    assert sum(len(file.extents) for file in files) == 2


def test_a_block_that_is_not_full_ends_its_extent() -> None:
    (file,) = found(header(10, 5, 0, 9, visible_bytes=10), header(11, 5, 1, 9)).files()
    assert [extent.tail_visible_bytes for extent in file.extents] == [10, BLOCK]


def test_the_newest_of_several_has_the_place() -> None:
    blocks = found(
        header(10, 5, 0, 9), header(300, 5, 0, 4), header(11, 5, 1, 9), header(2, 5, 0, 8)
    )
    (file,) = blocks.files()
    assert [extent.replicas[0].block for extent in file.extents] == [10]
    assert (file.block_count, file.superseded_count) == (2, 2)


def test_long_files_have_extents_of_the_largest_size() -> None:
    (file,) = found(*(header(block, 5, block, 1) for block in range(300))).files()
    assert [extent.block_count for extent in file.extents] == [128, 128, 44]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ino": 1}, {"ino": 1 << 63}, {"generation": 0}, {"generation": 1 << 63},
        {"visible_bytes": 0}, {"visible_bytes": BLOCK + 1}, {"stored_bytes": BLOCK + 1},
        {"file_block": 1 << 52},
    ],
)  # fmt: skip
def test_headers_that_cannot_be_are_counted(wrong: dict[str, int]) -> None:
    values = {"block": 1, "ino": 5, "file_block": 0, "generation": 3} | wrong
    blocks = found(header(**values))
    assert (list(blocks.files()), blocks.senseless_count) == ([], 1)
    assert blocks.next_ino == 2


class StandInServer:
    """A storage server's answers from memory; damage of choice."""

    def __init__(self, store: MemoryHeaders, content: bytes = b"") -> None:
        self.store = store
        self.content = content
        self.unreadable: set[int] = set()
        self.calls = 0

    async def call(
        self, opcode: Opcode, request: Any, *, into: memoryview | None = None
    ) -> HeaderPage | Empty:
        await trio.lowlevel.checkpoint()
        self.calls += 1
        if isinstance(request, ReadHeaders):
            page, next_block = self.store.read(request.first_block, request.header_limit)
            return HeaderPage(tuple(page), next_block)
        assert isinstance(request, ReadBlocks) and into is not None
        end = request.offset + request.byte_count
        for block in range(request.offset // BLOCK, -(-end // BLOCK)):
            if block in self.unreadable:
                raise DamagedError(f"block {block}: Input/output error")
        into[:] = self.content[request.offset : end]
        return Empty()


def lost_region(server: StandInServer) -> LostRegion:
    info = RegionInfo(b"r" * 16, Tier.NVME, BLOCK, BLOCKS, True, "nvme", keeps_headers=True)
    return LostRegion(PlacedRegion(3, b"s" * 16, info, True), server)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
async def test_damaged_headers_are_passed_over(seed: int) -> None:
    print("seed", seed)
    dice = random.Random(seed)
    store = MemoryHeaders(BLOCKS, BLOCK)
    store.headers = {block: header(block, 5, block, 1) for block in dice.sample(range(BLOCKS), 200)}
    store.damaged = {BLOCKS - 1}
    for at in range(0, BLOCKS, 100):
        first = dice.randrange(at, at + 98)
        store.damaged.update(range(first, first + dice.randint(1, 3)))
    server = StandInServer(store)
    region = lost_region(server)
    blocks = [one.block async for one in region.headers()]
    assert blocks == sorted(store.headers.keys() - store.damaged)
    assert region.damaged_headers == sorted(store.damaged)


async def test_whole_headers_take_few_questions() -> None:
    store = MemoryHeaders(BLOCKS, BLOCK)
    store.headers = {block: header(block, 5, block, 1) for block in range(BLOCKS)}
    server = StandInServer(store)
    assert [one.block async for one in lost_region(server).headers()] == list(range(BLOCKS))
    assert server.calls == -(-BLOCKS // HEADER_PAGE_MAX)


async def test_damaged_blocks_are_found() -> None:
    content = random.Random(3).randbytes(BLOCK * 100)
    sums = b"".join(
        xxhash.xxh3_64_intdigest(content[at : at + BLOCK]).to_bytes(8, "little")
        for at in range(10 * BLOCK, 90 * BLOCK, BLOCK)
    )
    tail = content[90 * BLOCK : 90 * BLOCK + 55]
    sums += xxhash.xxh3_64_intdigest(tail).to_bytes(8, "little")
    extent = Extent(200, 81, 55, 55, (Location(3, 10, 1),), sums)
    broken = bytearray(content)
    for block in (10, 47, 90):
        broken[block * BLOCK + 54] ^= 1
    server = StandInServer(MemoryHeaders(BLOCKS, BLOCK), bytes(broken))
    region = lost_region(server)
    assert await region.damaged_blocks(extent) == [200, 237, 280]
    server.unreadable = {11, 47}
    assert await region.damaged_blocks(extent) == [200, 201, 237, 280]
    server.content, server.unreadable = content, set()
    assert await region.damaged_blocks(extent) == []
