"""Regions in persistent memory on files: on tmpfs and on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError, NoSpaceError
from crailfs.pmem import libpmemobj
from crailfs.pmem.libpmemobj import Pool
from crailfs.pmem.library import Library
from crailfs.records import Tier
from crailfs.units import GIB, KIB, MIB
from crailfs.wire.messages import Access, FlushMethod
from storage_server.media import open_medium, pmem_pool
from storage_server.media import pmem_format as form
from tests.pmem.medium_contract import (
    BLOCK,
    CLUSTER,
    SIZE,
    MediumContract,
    open_pmem,
)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "region"


@pytest.fixture
def config(path: Path) -> RegionConfig:
    return RegionConfig(tier=Tier.PMEM, path=path, size_bytes=SIZE)


class TestContract(MediumContract):
    """On both kinds of file."""


async def test_tmpfs_is_never_durable_and_says_so(on_tmpfs: Path) -> None:
    medium = open_pmem(RegionConfig(tier=Tier.PMEM, path=on_tmpfs / "region", size_bytes=SIZE))
    assert medium.kind == "file on tmpfs (not durable)"
    assert not medium.durable and not await medium.flush()
    assert medium.layout.flush_method is FlushMethod.CACHE_LINES
    assert not medium.layout.map_sync
    medium.close()


async def test_a_file_on_disk_is_a_stand_in_that_msync_flushes(on_disk: Path) -> None:
    medium = open_pmem(RegionConfig(tier=Tier.PMEM, path=on_disk / "region", size_bytes=SIZE))
    assert medium.kind == "file as a stand-in (not durable)"
    assert not medium.durable and not await medium.flush()
    assert medium.layout.access is Access.MAP
    assert medium.layout.flush_method is FlushMethod.MAPPING
    medium.close()


def test_the_environment_makes_no_file_persistent_memory(directory: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from crailfs.records import Tier\n"
        "from tests.pmem.medium_contract import RegionConfig, SIZE, open_pmem\n"
        "config = RegionConfig(tier=Tier.PMEM, path=pathlib.Path(sys.argv[1]), size_bytes=SIZE)\n"
        "medium = open_pmem(config)\n"
        "print(medium.kind, medium.layout.flush_method.name, medium.layout.map_sync)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, directory / "region"],
        env=os.environ | {"PMEM_IS_PMEM_FORCE": "1"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout in (
        "file on tmpfs (not durable) CACHE_LINES False\n",
        "file as a stand-in (not durable) MAPPING False\n",
    )


def test_open_medium_makes_a_region_for_the_tier(config: RegionConfig) -> None:
    medium = open_medium(config, cluster_id=CLUSTER, block_size_bytes=BLOCK, known_uuid=None)
    assert medium.superblock.tier == Tier.PMEM
    assert medium.headers is not None and medium.headers.held_blocks == 0
    medium.close()


def test_a_missing_library_is_named_in_the_configuration_error(
    config: RegionConfig, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Library("libpmemobj-absent.so.1", "libpmemobj1")
    monkeypatch.setattr(libpmemobj, "missing", absent.missing)
    with pytest.raises(ConfigurationError, match=r"tier pmem.*Debian package libpmemobj1"):
        open_pmem(config)
    assert not path.exists()


def test_both_superblock_copies_are_there_and_one_repairs_the_other(
    config: RegionConfig, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    superblock = open_closed(config)
    encoded = superblock_bytes(config)
    data = path.read_bytes()
    assert data.count(encoded) == 2
    for position in (data.find(encoded), data.rfind(encoded)):
        flip_bit(path, position + 20)
        assert open_closed(config) == superblock
    assert caplog.text.count("repairing the superblock") == 2
    assert path.read_bytes().count(encoded) == 2


def test_two_damaged_copies_are_refused_and_left_alone(config: RegionConfig, path: Path) -> None:
    open_closed(config)
    encoded = superblock_bytes(config)
    data = path.read_bytes()
    for position in (data.find(encoded), data.rfind(encoded)):
        flip_bit(path, position + 20)
    with pytest.raises(DamagedError, match="superblock are damaged"):
        open_pmem(config)
    assert encoded not in path.read_bytes()


@pytest.mark.parametrize(
    ("offset", "what"), [(form.STATE_OFFSET, "record of applied"), (form.DIRECTORY_OFFSET, "dir")]
)
def test_a_damaged_root_is_refused(
    config: RegionConfig, path: Path, offset: int, what: str
) -> None:
    open_closed(config)
    root = path.read_bytes().find(superblock_bytes(config))
    flip_bit(path, root + offset + 9)
    with pytest.raises(DamagedError, match=what):
        open_pmem(config)


@pytest.mark.parametrize("missing_bytes", [1, MIB, SIZE, SIZE + 10 * MIB])
def test_a_region_cut_short_is_refused(
    config: RegionConfig, path: Path, missing_bytes: int
) -> None:
    open_closed(config)
    os.truncate(path, path.stat().st_size - missing_bytes)
    with pytest.raises(DamagedError, match="cut short"):
        open_pmem(config)


def test_a_damaged_pool_is_refused(config: RegionConfig, path: Path) -> None:
    open_closed(config)
    flip_bit(path, 40)
    with pytest.raises(DamagedError, match="checksum"):
        open_pmem(config)


@pytest.mark.parametrize("size", [17, 3 * MIB])
def test_a_file_that_is_no_region_is_refused_and_left_alone(
    config: RegionConfig, path: Path, size: int
) -> None:
    thesis = b"somebody's thesis".ljust(size, b".")
    path.write_bytes(thesis)
    with pytest.raises(BusyError, match="not a CrailFS region"):
        open_pmem(config)
    assert path.read_bytes() == thesis


def test_a_pool_of_another_program_is_refused(config: RegionConfig, path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 16 * MIB)
    Pool.create(path, "another", count_unsafe_shutdowns=True).close()
    with pytest.raises(BusyError, match="not a CrailFS region"):
        open_pmem(config)


def test_a_region_that_pmdk_has_open_elsewhere_is_busy(config: RegionConfig, path: Path) -> None:
    open_closed(config)
    pool = Pool.open(path, form.layout_name(path.stat().st_size))
    with pytest.raises(BusyError, match="served by another process"):
        open_pmem(config)
    pool.close()


def test_what_is_neither_file_nor_device_is_refused(on_disk: Path) -> None:
    for path in (Path("/dev/zero"), Path("/dev/dax77.7"), on_disk, on_disk / "absent" / "region"):
        with pytest.raises(ConfigurationError):
            open_pmem(RegionConfig(tier=Tier.PMEM, path=path, size_bytes=SIZE))
    assert not Path("/dev/.dax77.7.new").exists()


def test_a_region_smaller_than_a_block_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="size_bytes = 65535 makes 0 blocks"):
        open_pmem(RegionConfig(tier=Tier.PMEM, path=path, size_bytes=BLOCK - 1))
    assert not path.exists()


def test_a_region_that_finds_no_room_leaves_nothing(path: Path) -> None:
    with pytest.raises(NoSpaceError, match="make size_bytes smaller"):
        open_pmem(RegionConfig(tier=Tier.PMEM, path=path, size_bytes=1 << 44))
    assert list(path.parent.iterdir()) == []


def test_a_host_short_of_memory_makes_no_region_in_it(
    on_tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmem_pool, "host_memory_available_bytes", lambda: 260 * MIB)
    with pytest.raises(NoSpaceError, match=r"the host has 4\.0 MiB"):
        open_pmem(RegionConfig(tier=Tier.PMEM, path=on_tmpfs / "region", size_bytes=SIZE))
    assert list(on_tmpfs.iterdir()) == []


def test_a_vanished_region_on_disk_is_not_made_anew(on_disk: Path) -> None:
    config = RegionConfig(tier=Tier.PMEM, path=on_disk / "region", size_bytes=SIZE)
    superblock = open_pmem(config)
    superblock.close()
    config.path.unlink()
    with pytest.raises(DamagedError, match="is gone"):
        open_pmem(config, known=superblock.superblock.region_uuid)
    assert list(on_disk.iterdir()) == []


def test_a_vanished_region_on_tmpfs_comes_back_as_another_one(on_tmpfs: Path) -> None:
    config = RegionConfig(tier=Tier.PMEM, path=on_tmpfs / "region", size_bytes=SIZE)
    first = open_pmem(config)
    first.close()
    config.path.unlink()
    second = open_pmem(config, known=first.superblock.region_uuid)
    assert second.superblock.region_uuid != first.superblock.region_uuid
    second.close()


def test_a_region_of_another_tier_is_refused(path: Path) -> None:
    config = RegionConfig(tier=Tier.DISK, path=path, size_bytes=SIZE)
    open_medium(config, cluster_id=CLUSTER, block_size_bytes=BLOCK, known_uuid=None).close()
    with pytest.raises(BusyError, match="not a CrailFS region of tier pmem"):
        open_pmem(RegionConfig(tier=Tier.PMEM, path=path, size_bytes=SIZE))


@pytest.mark.parametrize("step", ["allocate", "write"])
def test_what_a_crash_left_of_making_a_region_is_made_anew(
    config: RegionConfig, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Pool, step, _crash)
        with pytest.raises(KeyboardInterrupt):
            open_pmem(config)
    assert not path.exists()
    open_closed(config)
    assert [entry.name for entry in path.parent.iterdir()] == ["region"]


def _crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("block_size", [4 * KIB, 64 * KIB, MIB])
@pytest.mark.parametrize("size", [MIB, 4 * MIB, 101 * MIB])
def test_pools_have_room_for_what_they_were_sized_for(
    on_tmpfs: Path, monkeypatch: pytest.MonkeyPatch, size: int, block_size: int
) -> None:
    monkeypatch.setattr(form, "SEGMENT_BYTES", 4 * MIB)
    config = RegionConfig(tier=Tier.PMEM, path=on_tmpfs / "region", size_bytes=size)
    medium = open_pmem(config, block=block_size)
    assert medium.superblock.data_size_bytes == size
    assert len(medium.layout.segment_offsets) == -(-size // (4 * MIB))
    assert len(set(medium.layout.segment_offsets)) == len(medium.layout.segment_offsets)
    medium.close()


@pytest.mark.parametrize("block_size", [4 * KIB, 64 * KIB, MIB])
def test_a_device_is_filled_as_far_as_certain(block_size: int) -> None:
    for device_bytes in (100 * MIB, GIB - 2 * MIB, 127 * GIB):
        count = form.blocks_fitting(device_bytes, block_size)
        assert form.pool_bytes_for(count, block_size) <= device_bytes
        assert form.pool_bytes_for(count + 1, block_size) > device_bytes
        assert count * block_size > 0.75 * device_bytes
    assert form.blocks_fitting(MIB, block_size) == 0


def open_closed(config: RegionConfig) -> object:
    medium = open_pmem(config)
    medium.close()
    return medium.superblock


def superblock_bytes(config: RegionConfig) -> bytes:
    medium = open_pmem(config)
    medium.close()
    return medium.superblock.encode()


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
