"""Regions in persistent memory on real DAX: a devdax device and a file on a DAX file system."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, DamagedError
from crailfs.pmem import libpmem, libpmemobj
from crailfs.pmem.mapping import SegmentMapping
from crailfs.records import Tier
from crailfs.units import MIB
from crailfs.wire.messages import FlushMethod
from storage_server.media import pmem_format as form
from storage_server.media.pmem_place import Kind, examine
from tests.pmem.medium_contract import SIZE, MediumContract, change, open_pmem


def clear(device: Path) -> None:
    """Make it look as if nothing had ever been on it."""
    fd = os.open(device, os.O_RDWR)
    front = SegmentMapping(fd, [0], form.FRONT_BYTES, form.FRONT_BYTES, synchronous=False)
    libpmem.memset(front.address, 0, form.FRONT_BYTES)
    os.close(fd)


def devdax_config(device: Path, *, overwrite: bool = False) -> RegionConfig:
    return RegionConfig(tier=Tier.PMEM, path=device, size_bytes=1, overwrite=overwrite)


@pytest.fixture
def empty_devdax(devdax: Path) -> Iterator[Path]:
    clear(devdax)
    yield devdax
    clear(devdax)


class TestDevdax(MediumContract):
    @pytest.fixture
    def config(self, empty_devdax: Path, monkeypatch: pytest.MonkeyPatch) -> RegionConfig:
        # The contract is about a region, not about a device's size.
        monkeypatch.setattr(form, "blocks_fitting", lambda _, block_size: SIZE // block_size)
        return devdax_config(empty_devdax)


class TestFsdax(MediumContract):
    @pytest.fixture
    def config(self, fsdax: Path) -> Iterator[RegionConfig]:
        path = fsdax / "region"
        yield RegionConfig(tier=Tier.PMEM, path=path, size_bytes=SIZE)
        path.unlink(missing_ok=True)


async def test_a_whole_devdax_is_durable_persistent_memory(empty_devdax: Path) -> None:
    medium = open_pmem(devdax_config(empty_devdax))
    assert medium.kind == "devdax"
    assert medium.durable and await medium.flush()
    assert medium.layout.flush_method is FlushMethod.CACHE_LINES
    fd = os.open(empty_devdax, os.O_RDWR)
    place = examine(empty_devdax, fd)
    os.close(fd)
    assert place.kind is Kind.DEVDAX
    assert 0.9 * place.size_bytes < medium.superblock.data_size_bytes < place.size_bytes
    assert medium.blocks is not None
    medium.blocks[-5:] = b"final"
    medium.persist(medium.superblock.data_size_bytes - 5, 5)
    while medium.provision(medium.superblock.block_count):
        pass
    medium.close()
    again = open_pmem(devdax_config(empty_devdax), known=medium.superblock.region_uuid)
    assert again.blocks is not None and again.blocks[-5:] == b"final"
    again.close()


def test_the_library_agrees_that_devdax_is_persistent(empty_devdax: Path) -> None:
    mapping = libpmem.map_file(empty_devdax)
    assert mapping.is_pmem
    assert libpmem.is_pmem(mapping.address, mapping.byte_count)
    libpmem.unmap(mapping)


async def test_fsdax_is_durable_and_mapped_synchronously(fsdax: Path) -> None:
    path = fsdax / "region"
    medium = open_pmem(RegionConfig(tier=Tier.PMEM, path=path, size_bytes=SIZE))
    assert medium.kind == "fsdax"
    assert medium.durable and await medium.flush()
    assert medium.layout.map_sync
    assert medium.layout.flush_method is FlushMethod.CACHE_LINES
    medium.close()
    mapping = libpmem.map_file(path)
    assert mapping.is_pmem
    libpmem.unmap(mapping)
    path.unlink()


def test_mappings_use_large_pages(empty_devdax: Path) -> None:
    medium = open_pmem(devdax_config(empty_devdax))
    assert medium.blocks is not None
    medium.blocks[:: 2 * MIB].tobytes()
    pages = []
    for entry in Path("/proc/self/smaps").read_text().split("VmFlags"):
        if str(empty_devdax) in entry:
            pages.append([line.split()[1] for line in entry.splitlines() if "PageSize" in line])
    medium.close()
    assert pages and all(sizes[0] == "2048" for sizes in pages), pages


def test_a_device_that_holds_something_else_is_refused_unless_told(empty_devdax: Path) -> None:
    fd = os.open(empty_devdax, os.O_RDWR)
    front = SegmentMapping(fd, [0], form.FRONT_BYTES, form.FRONT_BYTES, synchronous=False)
    os.close(fd)
    libpmem.memcpy(front.address + 1080, b"\x53\xef")  # where ext4 has its magic
    with pytest.raises(BusyError, match="overwrite = true"):
        open_pmem(devdax_config(empty_devdax))
    assert bytes(front.view[1080:1082]) == b"\x53\xef"
    medium = open_pmem(devdax_config(empty_devdax, overwrite=True))
    medium.headers.apply([change(1, [b"kept"])], 1)
    medium.close()
    # A region is not overwritten, whatever the setting.
    again = open_pmem(devdax_config(empty_devdax, overwrite=True))
    assert again.superblock == medium.superblock
    assert again.headers.held_blocks == 1
    again.close()


def test_a_known_region_that_left_its_device_is_missed(empty_devdax: Path) -> None:
    with pytest.raises(DamagedError, match="is gone"):
        open_pmem(devdax_config(empty_devdax), known=b"k" * 16)
    with pytest.raises(DamagedError, match="is gone"):
        open_pmem(devdax_config(empty_devdax, overwrite=True), known=b"k" * 16)


@pytest.mark.parametrize("step", ["allocate", "write"])
def test_what_a_crash_left_of_making_a_region_is_made_anew(
    empty_devdax: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(libpmemobj.Pool, step, crash)
        with pytest.raises(KeyboardInterrupt):
            open_pmem(devdax_config(empty_devdax))
    medium = open_pmem(devdax_config(empty_devdax))
    data = random.Random(step).randbytes(5000)
    assert medium.try_write(0, memoryview(data))
    assert medium.blocks is not None and medium.blocks[:5000] == data
    medium.close()


def test_a_damaged_region_is_made_anew_only_when_given_up(empty_devdax: Path) -> None:
    medium = open_pmem(devdax_config(empty_devdax))
    medium.close()
    fd = os.open(empty_devdax, os.O_RDWR)
    front = SegmentMapping(fd, [0], form.FRONT_BYTES, form.FRONT_BYTES, synchronous=False)
    os.close(fd)
    libpmem.memcpy(front.address + 40, b"damaged")
    known = medium.superblock.region_uuid
    with pytest.raises(DamagedError, match="checksum"):
        open_pmem(devdax_config(empty_devdax))
    with pytest.raises(DamagedError, match="checksum"):
        open_pmem(devdax_config(empty_devdax, overwrite=True), known=known)
    again = open_pmem(devdax_config(empty_devdax, overwrite=True))
    assert again.superblock.region_uuid != known
    again.close()
