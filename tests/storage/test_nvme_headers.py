"""Block headers of regions with direct I/O: what is kept, and what a crash leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crailfs.errors import DamagedError, InvalidError
from crailfs.records import BlockHeader, HeaderChange, Tier
from crailfs.units import KIB, MIB
from storage_server.media import nvme_headers
from storage_server.media.nvme_headers import (
    HEADERS_PER_PAGE,
    PAGE_BYTES,
    HeaderTable,
    header_area_bytes,
)
from storage_server.media.superblock import Superblock
from tests.support.headers import headers_of

BLOCKS = 400
BLOCK = 64 * KIB
SUPERBLOCK = Superblock(b"region of a test", b"c" * 16, Tier.NVME, BLOCK, BLOCKS)
SECTOR = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "headers"
    path.write_bytes(bytes(header_area_bytes(BLOCKS)))
    return path


def open_table(path: Path) -> HeaderTable:
    """Its descriptor lives as long as the test's process."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    return HeaderTable(fd, path, SUPERBLOCK, 0)


@pytest.fixture
def table(path: Path) -> Iterator[HeaderTable]:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield HeaderTable(fd, path, SUPERBLOCK, 0)
    os.close(fd)


def published(block: int, count: int, ino: int, *, generation: int = 1) -> HeaderChange:
    checksums = b"".join((ino * 1000 + index).to_bytes(8, "little") for index in range(count))
    return HeaderChange(1, block, count, ino, 7, generation, 5000, 4000, checksums)


def freed(block: int, count: int) -> HeaderChange:
    return HeaderChange(1, block, count, 0)


def content(table: HeaderTable) -> list[BlockHeader]:
    headers, end = table.read(0, BLOCKS + 1)
    assert end == BLOCKS and table.held_blocks == len(headers)
    return headers


def test_keeps_every_field_and_only_the_last_block_is_partial(
    table: HeaderTable, path: Path
) -> None:
    table.apply([published(84, 3, 12, generation=9)], 5)
    expected = [
        BlockHeader(84, 12, 7, 9, BLOCK, BLOCK, 12_000),
        BlockHeader(85, 12, 8, 9, BLOCK, BLOCK, 12_001),
        BlockHeader(86, 12, 9, 9, 5000, 4000, 12_002),
    ]
    again = open_table(path)
    assert content(table) == content(again) == expected
    assert again.applied_sequence == 5 and again.held_blocks == 3


def test_freed_blocks_have_no_header(table: HeaderTable, path: Path) -> None:
    table.apply([published(0, 10, 3)], 1)
    table.apply([freed(2, 3), published(4, 1, 8)], 2)
    assert [header.ino for header in content(open_table(path))] == [3, 3, 8, 3, 3, 3, 3, 3]


def test_reads_in_pages_from_any_block_on(table: HeaderTable) -> None:
    table.apply([published(3, 2, 1), published(300, 4, 2)], 1)
    assert [header.block for header in table.read(0, 3)[0]] == [3, 4, 300]
    headers, block = table.read(table.read(0, 3)[1], 100)
    assert [header.block for header in headers] == [301, 302, 303] and block == BLOCKS
    assert table.read(BLOCKS, 10) == ([], BLOCKS)


def test_the_same_changes_again_change_nothing(table: HeaderTable, path: Path) -> None:
    changes = [published(80, 20, 5), freed(85, 1)]
    table.apply(changes, 3)
    before = content(table)
    table.apply(changes, 3)
    assert content(table) == before == content(open_table(path))


def test_a_sequence_without_changes_for_this_region_is_kept(table: HeaderTable, path: Path) -> None:
    table.apply([], 77)
    assert open_table(path).applied_sequence == 77


@pytest.mark.parametrize(
    "change",
    [
        published(BLOCKS - 1, 2, 1),
        published(-1, 2, 1),
        HeaderChange(1, 0, 2, 1, 0, 1, 1, 1, bytes(8)),
        HeaderChange(1, 0, 1, 1, 0, 1, BLOCK + 1, 1, bytes(8)),
        HeaderChange(1, 0, 1, 1, 0, 1, 5, 6, bytes(8)),
        HeaderChange(1, 0, 1, 1, 0, 0, 5, 5, bytes(8)),
        HeaderChange(1, 0, 1, 1 << 64, 0, 1, 5, 5, bytes(8)),
        HeaderChange(1, 0, 1, 1, -1, 1, 5, 5, bytes(8)),
        freed(0, 0),
    ],
)
def test_a_change_that_cannot_be_is_refused_and_changes_nothing(
    table: HeaderTable, path: Path, change: HeaderChange
) -> None:
    table.apply([published(0, 1, 1)], 1)
    with pytest.raises(InvalidError, match="header change"):
        table.apply([published(5, 1, 2), change], 2)
    assert [header.block for header in content(table)] == [0]
    assert [header.block for header in content(open_table(path))] == [0]


def test_a_damaged_header_is_named_and_the_others_can_be_read(
    table: HeaderTable, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.apply([published(block, 1, 1_000_000 + block) for block in range(4)], 1)
    damage = path.read_bytes().index((1_000_001).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.seek(damage)
        file.write(b"\x0e")
    again = open_table(path)
    assert "headers of blocks 0 to 85 are damaged" in caplog.text
    headers, next_block = again.read(0, 10)
    assert [header.ino for header in headers] == [1_000_000] and next_block == 1
    with pytest.raises(DamagedError, match="block 1 is damaged"):
        again.read(1, 10)
    assert [header.ino for header in again.read(2, 10)[0]] == [1_000_002, 1_000_003]
    again.apply([published(1, 1, 5)], 2)
    assert [header.ino for header in content(open_table(path))][:2] == [1_000_000, 5]


def test_headers_that_the_device_does_not_deliver_are_damaged_ones(
    table: HeaderTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.apply([published(0, 1, 1), published(200, 1, 2)], 1)
    first_page, preadv = 2 * 32 * KIB, os.preadv

    def fail(fd: int, buffers: list[memoryview], position: int) -> int:
        if position <= first_page + 5 * PAGE_BYTES < position + len(buffers[0]):
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, position)

    monkeypatch.setattr(nvme_headers.os, "preadv", fail)
    # The page at fault is the first version of blocks 0 to 85, the second place's first page.
    again = open_table(path)
    with pytest.raises(DamagedError, match="block 0 is damaged"):
        again.read(0, 10)
    assert [header.block for header in again.read(85, 10)[0]] == [200]


def test_two_damaged_roots_are_refused(table: HeaderTable, path: Path) -> None:
    table.apply([published(0, 1, 1)], 1)
    table.apply([published(1, 1, 1)], 2)
    with path.open("r+b") as file:
        for offset in (8, 32 * KIB + 8):
            file.seek(offset)
            file.write(b"\xaa")
    with pytest.raises(DamagedError, match="both roots"):
        open_table(path)


def test_headers_of_another_region_are_none_of_this_one(table: HeaderTable, path: Path) -> None:
    table.apply([published(0, 1, 1)], 1)
    other = Superblock(b"another region..", b"c" * 16, Tier.NVME, BLOCK, BLOCKS)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with pytest.raises(DamagedError, match="both roots"):
        HeaderTable(fd, path, other, 0)
    os.close(fd)


def test_a_million_blocks_take_less_than_100_mib_in_memory(tmp_path: Path) -> None:
    blocks = 1_000_000
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(header_area_bytes(blocks))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    resident = _resident_bytes()
    large = Superblock(b"r" * 16, b"c" * 16, Tier.NVME, BLOCK, blocks)
    table = HeaderTable(fd, path, large, 0)
    assert _resident_bytes() - resident < 10 * MIB
    for sequence, first in enumerate(range(0, blocks, 100_000), 1):
        table.apply(
            [published(at, 1_000, 3) for at in range(first, first + 100_000, 1_000)], sequence
        )
    assert table.held_blocks == blocks
    assert _resident_bytes() - resident < 100 * MIB
    assert HeaderTable(fd, path, large, 0).held_blocks == blocks
    os.close(fd)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# --- power cuts -----------------------------------------------------------------------------------


@dataclass
class Recorder:
    """What was written to the file, in order, with the flushes in between (position -1)."""

    monkeypatch: pytest.MonkeyPatch
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pwrite, fdatasync = os.pwrite, os.fdatasync

        def record_write(fd: int, data: memoryview, position: int) -> int:
            self.writes.append((position, bytes(data)))
            return pwrite(fd, data, position)

        def record_flush(fd: int) -> None:
            self.writes.append((-1, b""))
            fdatasync(fd)

        self.monkeypatch.setattr(nvme_headers.os, "pwrite", record_write)
        self.monkeypatch.setattr(nvme_headers.os, "fdatasync", record_flush)


def random_changes(rng: random.Random) -> list[HeaderChange]:
    changes = []
    for _ in range(rng.randint(1, 6)):
        block = rng.randrange(BLOCKS - 1)
        count = rng.randint(1, min(120, BLOCKS - block))
        if rng.random() < 0.4:
            changes.append(freed(block, count))
        else:
            changes.append(published(block, count, rng.randint(1, 1 << 40)))
    return changes


def _power_cut(image: bytes, unflushed: list[tuple[int, bytes]], rng: random.Random) -> bytearray:
    """Of what was not flushed any sectors may have arrived, in any order, or parts of them."""
    left = bytearray(image)
    for position, data in unflushed:
        for at in range(0, len(data), SECTOR):
            fate = rng.random()
            size = SECTOR if fate < 0.5 else rng.randrange(SECTOR) if fate < 0.6 else 0
            left[position + at : position + at + size] = data[at : at + size]
    return left


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_at_any_instant_leaves_the_old_or_the_new_state(
    table: HeaderTable, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    durable = path.read_bytes()
    recorder = Recorder(monkeypatch)
    states = [(0, content(table))]
    batches = []
    for sequence in range(1, 13):
        recorder.writes.clear()
        table.apply(random_changes(rng), sequence)
        batches.append(list(recorder.writes))
        states.append((table.applied_sequence, content(table)))
    monkeypatch.undo()
    cut_path = tmp_path / "cut"
    for index, writes in enumerate(batches):
        unflushed: list[tuple[int, bytes]] = []
        for write in writes:
            if write[0] >= 0:
                unflushed.append(write)
            for _ in range(6):
                _check_after_cut(cut_path, _power_cut(durable, unflushed, rng), states, index, rng)
            if write[0] < 0:
                image = bytearray(durable)
                for position, data in unflushed:
                    image[position : position + len(data)] = data
                durable = bytes(image)
                unflushed = []
        assert not unflushed


def _check_after_cut(
    cut_path: Path,
    image: bytearray,
    states: list[tuple[int, list[BlockHeader]]],
    index: int,
    rng: random.Random,
) -> None:
    """The state is one of the two, and what is applied to it next is there afterwards."""
    cut_path.write_bytes(image)
    fd = os.open(cut_path, os.O_RDWR | os.O_DIRECT)
    found = HeaderTable(fd, cut_path, SUPERBLOCK, 0)
    state = (found.applied_sequence, content(found))
    assert state in (states[index], states[index + 1])
    if rng.random() < 0.3:
        # Another batch than the one that was cut off, which must not come back.
        changes = random_changes(rng)
        model = {header.block: header for header in state[1]}
        for change in changes:
            for offset in range(change.block_count):
                model.pop(change.block + offset, None)
            model |= {header.block: header for header in headers_of(change, BLOCK)}
        found.apply(changes, 1_000)
        expected = [model[block] for block in sorted(model)]
        assert content(found) == expected
        again = HeaderTable(fd, cut_path, SUPERBLOCK, 0)
        assert content(again) == expected and again.applied_sequence == 1_000
    os.close(fd)


def test_a_batch_that_failed_half_way_never_becomes_valid(
    table: HeaderTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.apply([published(0, 300, 1)], 1)
    fail = [False, True]

    def pwrite(fd: int, data: memoryview, position: int, real: object = os.pwrite) -> int:
        if position >= 2 * 32 * KIB and fail.pop(0):
            raise OSError(5, "Input/output error")
        return real(fd, data, position)  # type: ignore[operator,no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(nvme_headers.os, "pwrite", pwrite)
        with pytest.raises(OSError, match="Input/output error"):
            table.apply([published(0, 1, 2), published(299, 1, 2)], 2)
    table.apply([published(100, 1, 3)], 3)
    for found in (table, open_table(path)):
        assert {header.block for header in content(found) if header.ino != 1} == {100}


def test_after_a_root_in_doubt_nothing_is_changed_any_more(
    table: HeaderTable, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.apply([published(0, 1, 1)], 1)
    flushes = [True, False]

    def fdatasync(fd: int) -> None:
        if not flushes.pop(0):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(nvme_headers.os, "fdatasync", fdatasync)
        with pytest.raises(OSError, match="Input/output error"):
            table.apply([published(1, 1, 2)], 2)
    with pytest.raises(OSError, match="in doubt"):
        table.apply([published(2, 1, 2)], 3)
    assert open_table(path).applied_sequence in (1, 2)


def test_geometry() -> None:
    assert HEADERS_PER_PAGE == 85 and PAGE_BYTES == 4096
    assert header_area_bytes(1_000_000) / 1_000_000 < 97
