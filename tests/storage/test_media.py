"""What every medium promises, and what only memory and only disk do."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.config import RegionConfig
from crailfs.errors import (
    BusyError,
    ConfigurationError,
    DamagedError,
    InvalidError,
    NoSpaceError,
    NotSupportedError,
)
from crailfs.records import Tier
from crailfs.units import KIB, MIB
from storage_server.media import Medium, memory, open_medium, superblock
from storage_server.media.superblock import COPY_OFFSETS_BYTES, DATA_OFFSET_BYTES, Superblock

CLUSTER = b"c" * 16
BLOCK = 64 * KIB
TIERS = (Tier.MEMORY, Tier.NVME, Tier.DISK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "region"


@pytest.fixture(params=TIERS, ids=lambda tier: tier.name.lower())
def config(request: pytest.FixtureRequest, path: Path) -> RegionConfig:
    return RegionConfig(tier=request.param, path=path, size_bytes=4 * MIB)


def open_(config: RegionConfig, known: bytes | None = None, cluster: bytes = CLUSTER) -> Medium:
    return open_medium(config, cluster_id=cluster, block_size_bytes=BLOCK, known_uuid=known)


def provision_all(medium: Medium) -> None:
    while medium.provision(medium.superblock.block_count):
        pass


@pytest.fixture
def medium(config: RegionConfig) -> Iterator[Medium]:
    medium = open_(config)
    provision_all(medium)
    yield medium
    medium.close()


async def read(medium: Medium, offset: int, byte_count: int) -> bytes:
    buffer = bytearray(byte_count)
    await medium.read(offset, memoryview(buffer))
    return bytes(buffer)


def test_has_the_configured_number_of_blocks_and_all_become_usable(medium: Medium) -> None:
    assert medium.superblock.block_count == medium.usable_blocks == 64
    assert not medium.provision(medium.superblock.block_count)


@pytest.mark.parametrize("offset", [0, 4096, BLOCK - 4096, 4 * MIB - 8192])
async def test_reads_back_what_was_written(medium: Medium, offset: int) -> None:
    data = os.urandom(5000)
    await medium.write(offset, memoryview(data))
    assert await read(medium, offset, 5000) == data
    assert await read(medium, offset + 4095, 2) == data[4095:4097]


@pytest.mark.parametrize("offset", [1, BLOCK - 1, 4 * MIB - 5000])
async def test_a_write_begins_anywhere_or_is_refused_where_sectors_decide(
    medium: Medium, offset: int
) -> None:
    data = os.urandom(5000)
    if medium.superblock.tier == Tier.NVME:
        with pytest.raises(InvalidError, match="multiple of 4096"):
            medium.try_write(offset, memoryview(data))
        with pytest.raises(InvalidError, match="multiple of 4096"):
            await medium.write(offset, memoryview(data))
    else:
        await medium.write(offset, memoryview(data))
        assert await read(medium, offset, 5000) == data


async def test_the_last_byte_of_the_region_is_there(medium: Medium) -> None:
    await medium.write(4 * MIB - 4096, memoryview(bytes(4095) + b"z"))
    assert await read(medium, 4 * MIB - 1, 1) == b"z"


async def test_shared_descriptor_sees_the_same_bytes(medium: Medium) -> None:
    page = memoryview(mmap.mmap(-1, 4096))
    data_offset = medium.layout.data_offset
    await medium.write(BLOCK, memoryview(b"from the server"))
    assert os.preadv(medium.shared_fd, [page], data_offset + BLOCK) == 4096
    assert page[:15] == b"from the server"
    page[:13] = b"from a client"
    os.pwrite(medium.shared_fd, page, data_offset)
    assert await read(medium, 0, 13) == b"from a client"


async def test_only_a_durable_medium_says_so(medium: Medium) -> None:
    assert (
        await medium.flush() is medium.durable is (medium.superblock.tier in (Tier.NVME, Tier.DISK))
    )


async def test_keeps_uuid_and_bytes_when_opened_again(config: RegionConfig) -> None:
    first = open_(config)
    provision_all(first)
    await first.write(3 * BLOCK, memoryview(b"kept"))
    first.close()
    again = open_(config, known=first.superblock.region_uuid)
    assert again.superblock == first.superblock
    assert again.usable_blocks == 64
    assert await read(again, 3 * BLOCK, 4) == b"kept"
    again.close()


def test_keeps_its_size_when_the_configuration_asks_for_another(
    config: RegionConfig, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_(config).close()
    caplog.set_level("INFO")
    larger = RegionConfig(tier=config.tier, path=path, size_bytes=8 * MIB)
    medium = open_(larger)
    assert medium.superblock.block_count == 64
    assert "keeps the size" in caplog.text
    medium.close()


def test_a_second_server_is_refused_while_one_serves_it(config: RegionConfig) -> None:
    medium = open_(config)
    with pytest.raises(BusyError, match="served by another process"):
        open_(config)
    medium.close()
    open_(config).close()


def test_a_client_that_keeps_its_descriptor_does_not_keep_the_lock(config: RegionConfig) -> None:
    medium = open_(config)
    client_fd = os.dup(medium.shared_fd)
    medium.close()
    open_(config).close()
    os.close(client_fd)


def test_one_damaged_superblock_copy_is_repaired(
    config: RegionConfig, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for offset in COPY_OFFSETS_BYTES:
        first = open_(config)
        first.close()
        flip_bit(path, offset + 20)
        again = open_(config)
        assert again.superblock == first.superblock
        again.close()
    assert caplog.text.count("repairing the superblock") == 2
    caplog.clear()
    open_(config).close()
    assert not caplog.text


def test_two_damaged_copies_are_refused_and_left_alone(config: RegionConfig, path: Path) -> None:
    open_(config).close()
    for offset in COPY_OFFSETS_BYTES:
        flip_bit(path, offset + 20)
    before = path.read_bytes()
    with pytest.raises(DamagedError, match="superblock are damaged"):
        open_(config)
    assert path.read_bytes() == before


def test_a_region_cut_short_is_refused(config: RegionConfig, path: Path) -> None:
    open_(config).close()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedError, match="cut short"):
        open_(config)


def test_a_file_that_is_no_region_is_refused_and_left_alone(
    config: RegionConfig, path: Path
) -> None:
    path.write_bytes(b"somebody's thesis")
    with pytest.raises(BusyError, match="not a CrailFS region"):
        open_(config)
    assert path.read_bytes() == b"somebody's thesis"


def test_a_region_of_another_cluster_is_refused(config: RegionConfig) -> None:
    open_(config).close()
    with pytest.raises(BusyError, match="belongs to cluster"):
        open_(config, cluster=b"x" * 16)


def test_a_region_with_another_uuid_than_known_is_refused(config: RegionConfig) -> None:
    open_(config).close()
    with pytest.raises(DamagedError, match="Put the right file back"):
        open_(config, known=b"k" * 16)


def test_a_region_of_another_block_size_is_refused(config: RegionConfig) -> None:
    open_(config).close()
    with pytest.raises(ConfigurationError, match="blocks of 65536 bytes"):
        open_medium(config, cluster_id=CLUSTER, block_size_bytes=4 * KIB, known_uuid=None)


def test_a_region_smaller_than_a_block_is_refused(path: Path) -> None:
    for tier in TIERS:
        with pytest.raises(ConfigurationError, match="size_bytes = 65535 makes 0 blocks"):
            open_(RegionConfig(tier=tier, path=path, size_bytes=BLOCK - 1))
    assert not path.exists()


def test_a_missing_directory_is_named(config: RegionConfig, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "region"
    with pytest.raises(ConfigurationError, match="absent/region cannot be made"):
        open_(RegionConfig(tier=config.tier, path=path, size_bytes=MIB))


async def test_what_a_crash_left_of_making_a_region_is_made_anew(
    config: RegionConfig, path: Path
) -> None:
    path.with_name(".region.new").write_bytes(b"half made" * 1000)
    medium = open_(config)
    provision_all(medium)
    assert await read(medium, 0, 100) == bytes(100)
    assert [entry.name for entry in path.parent.iterdir()] == ["region"]
    medium.close()


def test_a_vanished_memory_region_comes_back_as_another_one(path: Path) -> None:
    config = RegionConfig(tier=Tier.MEMORY, path=path, size_bytes=MIB)
    first = open_(config)
    first.close()
    path.unlink()
    second = open_(config, known=first.superblock.region_uuid)
    assert second.superblock.region_uuid != first.superblock.region_uuid
    second.close()


def test_a_vanished_disk_region_is_not_made_anew(path: Path) -> None:
    config = RegionConfig(tier=Tier.DISK, path=path, size_bytes=MIB)
    first = open_(config)
    first.close()
    path.unlink()
    with pytest.raises(DamagedError, match="is gone"):
        open_(config, known=first.superblock.region_uuid)
    assert not path.exists()


def test_a_disk_region_that_finds_no_room_leaves_nothing(path: Path) -> None:
    config = RegionConfig(tier=Tier.DISK, path=path, size_bytes=1 << 50)
    with pytest.raises(NoSpaceError, match="make size_bytes smaller"):
        open_(config)
    assert list(path.parent.iterdir()) == []


def test_memory_is_reserved_only_as_far_as_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROVISION_STEP_BYTES", 4 * BLOCK)
    medium = open_(RegionConfig(tier=Tier.MEMORY, path=path, size_bytes=4 * MIB))
    assert medium.usable_blocks == 0
    seen = []
    while medium.provision(10):
        seen.append(medium.usable_blocks)
    assert seen[:3] == [4, 8, 10] and set(seen[3:]) == {10}
    allocated_bytes = os.stat(path).st_blocks * 512
    assert 10 * BLOCK <= allocated_bytes - DATA_OFFSET_BYTES < 11 * BLOCK
    medium.close()


async def test_an_unreadable_note_of_progress_costs_only_another_reservation(path: Path) -> None:
    config = RegionConfig(tier=Tier.MEMORY, path=path, size_bytes=MIB)
    medium = open_(config)
    provision_all(medium)
    await medium.write(0, memoryview(b"still here"))
    medium.close()
    flip_bit(path, 16 * KIB)
    again = open_(config)
    assert again.usable_blocks == 0
    provision_all(again)
    assert again.usable_blocks == 16
    assert await read(again, 0, 10) == b"still here"
    again.close()


def test_a_host_short_of_memory_stops_growth_until_there_is_some(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium = open_(RegionConfig(tier=Tier.MEMORY, path=path, size_bytes=MIB))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_memory_available_bytes", lambda: 100 * MIB)
        with pytest.raises(NoSpaceError, match="stays at"):
            medium.provision(16)
        assert medium.usable_blocks == 0
    provision_all(medium)
    assert medium.usable_blocks == 16
    medium.close()


def test_superblock_of_a_newer_format_is_refused_by_name(path: Path) -> None:
    config = RegionConfig(tier=Tier.DISK, path=path, size_bytes=MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superblock, "FORMAT_VERSION", 3)
        open_(config).close()
    with pytest.raises(NotSupportedError, match="format 3, this program knows 1 and 2"):
        open_(config)


def test_a_region_of_tier_nvme_without_direct_io_is_refused_with_what_to_do(path: Path) -> None:
    config = RegionConfig(tier=Tier.NVME, path=path, size_bytes=MIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(superblock, "_version_of", lambda tier: 1)
        open_(config).close()
    before = path.read_bytes()
    with pytest.raises(NotSupportedError, match="remove the file, and a new region is made"):
        open_(config)
    assert path.read_bytes() == before


def test_superblock_layout_is_fixed() -> None:
    record = Superblock(b"u" * 16, b"c" * 16, Tier.DISK, 65536, 1000).encode()
    assert record.hex() == (
        "43524149" "4c52474e" "00000001" "03000000"
        + "75" * 16
        + "63" * 16
        + "00010000" "00000000000003e8" "afadf47650005518"
    )  # fmt: skip
    record = Superblock(b"u" * 16, b"c" * 16, Tier.NVME, 65536, 1000, 1 << 20).encode()
    assert record.hex() == (
        "43524149" "4c52474e" "00000002" "02000000"
        + "75" * 16
        + "63" * 16
        + "00010000" "00000000000003e8" "0000000000100000" "c761595b25a9a72c"
    )  # fmt: skip


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
