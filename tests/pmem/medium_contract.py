"""What a region in persistent memory promises, whatever it lies on; classes give the ``config``.

Used here on files and in the lab on devices.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError, InvalidError
from crailfs.records import BlockHeader, HeaderChange
from crailfs.transports.persistent_region import PersistentRegion
from crailfs.units import KIB, MIB
from crailfs.wire.messages import AttachedRegion
from storage_server.media import pmem_format as form
from storage_server.media.pmem import PmemMedium
from storage_server.region import Region

CLUSTER = b"c" * 16
BLOCK = 64 * KIB
SIZE = 10 * MIB
SMALL_SEGMENT = 4 * MIB
"""So that regions of a test have several."""


def open_pmem(
    config: RegionConfig, known: bytes | None = None, cluster: bytes = CLUSTER, block: int = BLOCK
) -> PmemMedium:
    return PmemMedium.open(config, cluster_id=cluster, block_size_bytes=block, known_uuid=known)


def describe(medium: PmemMedium) -> AttachedRegion:
    """What clients of the host are told."""
    return Region(medium).attached


def change(
    block: int,
    datas: list[bytes],
    *,
    ino: int = 7,
    file_block: int = 0,
    generation: int = 3,
    visible: int | None = None,
) -> HeaderChange:
    """That ``datas`` lie in neighbouring blocks; all but the last are full."""
    return HeaderChange(
        1,
        block,
        len(datas),
        ino,
        file_block,
        generation,
        len(datas[-1]),
        len(datas[-1]) if visible is None else visible,
        b"".join(xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") for data in datas),
    )


def freed(block: int, block_count: int) -> HeaderChange:
    return HeaderChange(1, block, block_count, 0)


def all_headers(medium: PmemMedium, limit: int = 1 << 20) -> list[BlockHeader]:
    found: list[BlockHeader] = []
    block = 0
    while block < medium.superblock.block_count:
        page, block = medium.headers.read(block, limit)
        assert len(page) <= limit
        found += page
    return found


class MediumContract:
    """Needs a fixture ``config`` for a region that does not exist yet."""

    @pytest.fixture(autouse=True)
    def small_segments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(form, "SEGMENT_BYTES", SMALL_SEGMENT)

    @pytest.fixture
    def medium(self, config: RegionConfig) -> Iterator[PmemMedium]:
        medium = open_pmem(config)
        yield medium
        medium.close()

    async def test_bytes_and_headers_are_kept_over_all_segments(self, config: RegionConfig) -> None:
        medium = open_pmem(config)
        count = medium.superblock.block_count
        assert len(medium.layout.segment_offsets) >= 3
        assert medium.blocks is not None and len(medium.blocks) == count * BLOCK
        while medium.provision(count):
            pass
        assert medium.usable_blocks == count
        ends = (0, SMALL_SEGMENT // BLOCK - 1, SMALL_SEGMENT // BLOCK, count - 1)
        for block in ends:
            await medium.write(block * BLOCK, memoryview(block.to_bytes(2, "big") * (BLOCK // 2)))
        assert await medium.flush() is medium.durable
        medium.headers.apply([change(0, [b"x" * BLOCK] * count)], 5)
        medium.close()

        again = open_pmem(config, known=medium.superblock.region_uuid)
        assert again.superblock == medium.superblock
        assert again.headers.applied_sequence == 5
        assert again.headers.held_blocks == count
        assert [header.block for header in all_headers(again, 50)] == list(range(count))
        for block in ends:
            buffer = bytearray(BLOCK)
            assert again.try_read(block * BLOCK, memoryview(buffer))
            assert buffer == block.to_bytes(2, "big") * (BLOCK // 2)
        again.close()

    async def test_reads_and_writes_cross_segments(self, medium: PmemMedium) -> None:
        data = random.Random(1).randbytes(200_000)
        offset = SMALL_SEGMENT - 100_001
        await medium.write(offset, memoryview(data))
        buffer = bytearray(200_000)
        await medium.read(offset, memoryview(buffer))
        assert buffer == data

    async def test_clients_see_the_same_bytes(self, medium: PmemMedium) -> None:
        client = PersistentRegion(describe(medium), os.dup(medium.shared_fd))
        data = random.Random(2).randbytes(3 * SMALL_SEGMENT // 2)
        for offset, part in ((SMALL_SEGMENT - 5000, data), (17, data[:4000]), (9000, data[:1])):
            await client.write(offset, part)
            assert medium.blocks is not None
            assert medium.blocks[offset : offset + len(part)] == part
            assert await client.read(offset, len(part)) == part
        assert await client.flush() is medium.durable
        await client.close()

    def test_a_header_says_what_the_change_said(self, medium: PmemMedium) -> None:
        full, tail = b"f" * BLOCK, b"tail" * 100
        medium.headers.apply([change(63, [full, tail], file_block=12, visible=17)], 1)
        assert all_headers(medium) == [
            BlockHeader(63, 7, 12, 3, BLOCK, BLOCK, xxhash.xxh3_64_intdigest(full)),
            BlockHeader(64, 7, 13, 3, 400, 17, xxhash.xxh3_64_intdigest(tail)),
        ]
        assert medium.headers.held_blocks == 2

    def test_freed_blocks_have_no_header(self, medium: PmemMedium) -> None:
        medium.headers.apply([change(60, [b"1" * BLOCK] * 9)], 1)
        medium.headers.apply([freed(62, 5)], 2)
        assert [header.block for header in all_headers(medium)] == [60, 61, 67, 68]
        assert medium.headers.held_blocks == 4

    def test_the_last_change_of_a_block_counts(self, medium: PmemMedium) -> None:
        medium.headers.apply(
            [change(5, [b"old"], ino=1), freed(5, 1), change(5, [b"new"], ino=2), freed(6, 1)], 9
        )
        assert [(header.block, header.ino) for header in all_headers(medium)] == [(5, 2)]
        assert medium.headers.applied_sequence == 9

    def test_applying_again_changes_nothing(self, medium: PmemMedium) -> None:
        first = [change(1, [b"a" * BLOCK, b"a"]), change(9, [b"b"])]
        second = [freed(9, 1), change(70, [b"c"])]
        medium.headers.apply(first, 4)
        medium.headers.apply(second, 6)
        headers = all_headers(medium)
        for changes, last_sequence in ((second, 6), (first, 4)):
            medium.headers.apply(changes, last_sequence)
            assert all_headers(medium) == headers
            assert (medium.headers.applied_sequence, medium.headers.held_blocks) == (6, 3)

    def test_a_batch_without_changes_moves_the_sequence(self, config: RegionConfig) -> None:
        medium = open_pmem(config)
        medium.headers.apply([], 77)
        medium.close()
        again = open_pmem(config)
        assert again.headers.applied_sequence == 77
        again.close()

    def test_changes_that_cannot_be_are_refused_and_change_nothing(
        self, medium: PmemMedium
    ) -> None:
        count = medium.superblock.block_count
        good = change(1, [b"good"])
        for bad in (
            change(count, [b"behind the end"]),
            change(count - 1, [b"x" * BLOCK, b"crosses the end"]),
            change(-1, [b"before the begin"]),
            HeaderChange(1, 2, 2, 7, 0, 3, 5, 5, b"too few!"),
            HeaderChange(1, 2, 1, 7, 0, 3, BLOCK + 1, 5, b"checksum"),
            HeaderChange(1, 2, 1, 7, 0, 3, 5, 6, b"checksum"),
            HeaderChange(1, 2, 1, 7, 0, 0, 5, 5, b"checksum"),
            HeaderChange(1, 2, 0, 0),
        ):
            with pytest.raises(InvalidError):
                medium.headers.apply([good, bad], 3)
        assert all_headers(medium) == []
        assert medium.headers.applied_sequence == 0

    def test_a_damaged_header_is_noticed(self, config: RegionConfig) -> None:
        medium = open_pmem(config)
        medium.headers.apply([change(64, [b"good"]), change(70, [b"bad"])], 1)
        medium._region.pool.write(medium.headers._offset(70) + 20, b"\xff")
        medium.close()
        again = open_pmem(config)
        headers, next_block = again.headers.read(0, 10)
        assert [header.block for header in headers] == [64] and next_block == 70
        with pytest.raises(DamagedError, match="header of block 70"):
            again.headers.read(70, 2)
        assert again.headers.read(71, 2) == ([], again.superblock.block_count)
        again.close()

    def test_a_second_server_is_refused(self, config: RegionConfig, medium: PmemMedium) -> None:
        with pytest.raises(BusyError, match="served by another process"):
            open_pmem(config)

    def test_a_client_that_keeps_its_descriptor_keeps_no_lock(self, config: RegionConfig) -> None:
        medium = open_pmem(config)
        kept, view = os.dup(medium.shared_fd), medium.blocks
        medium.close()
        open_pmem(config).close()
        assert view is not None and view[0] == 0
        os.close(kept)

    def test_another_region_than_expected_is_refused(self, config: RegionConfig) -> None:
        open_pmem(config).close()
        with pytest.raises(BusyError, match="belongs to cluster"):
            open_pmem(config, cluster=b"x" * 16)
        with pytest.raises(DamagedError, match="Put the right file back"):
            open_pmem(config, known=b"k" * 16)
        with pytest.raises(ConfigurationError, match="blocks of 65536 bytes"):
            open_pmem(config, block=4 * KIB)
        open_pmem(config).close()

    def test_calls_after_the_end_fail(self, config: RegionConfig) -> None:
        medium = open_pmem(config)
        medium.close()
        with pytest.raises(OSError, match="Bad file"):
            medium.headers.read(0, 1)
        with pytest.raises(OSError, match="Bad file"):
            medium.headers.apply([], 1)

    def test_nothing_stays_mapped_after_its_last_use(self, config: RegionConfig) -> None:
        gc.disable()
        try:
            medium = open_pmem(config)
            medium.close()
            del medium
            assert f"{config.path}\n" not in Path("/proc/self/maps").read_text()
        finally:
            gc.enable()
