"""A client of the same host at a region in persistent memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from crailfs.config import RegionConfig
from crailfs.errors import NotSupportedError, ProtocolError
from crailfs.pmem import libpmem
from crailfs.pmem.library import Library
from crailfs.records import Tier
from crailfs.transports.persistent_region import PAST_CACHES_MIN_BYTES, PersistentRegion
from crailfs.units import MIB
from storage_server.media import pmem_format
from storage_server.media.pmem import PmemMedium
from tests.pmem.medium_contract import BLOCK, SIZE, describe, open_pmem


@pytest.fixture
def medium(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PmemMedium]:
    monkeypatch.setattr(pmem_format, "SEGMENT_BYTES", 4 * MIB)
    medium = open_pmem(
        RegionConfig(tier=Tier.PMEM, path=directory / "region", size_bytes=SIZE - BLOCK)
    )
    yield medium
    medium.close()


@pytest.mark.parametrize("byte_count", [1, PAST_CACHES_MIN_BYTES - 1, PAST_CACHES_MIN_BYTES, MIB])
@pytest.mark.parametrize("offset", [0, 1, 4 * MIB - 3])
async def test_writes_arrive_whatever_their_size_and_place(
    medium: PmemMedium, offset: int, byte_count: int
) -> None:
    region = PersistentRegion(describe(medium), os.dup(medium.shared_fd))
    source = b"-" + os.urandom(byte_count)
    assert medium.blocks is not None
    for data in (source[1:], bytearray(source[1:]), memoryview(source)[1:]):
        medium.blocks[:] = bytes(len(medium.blocks))
        await region.write(offset, data)
        assert medium.blocks[offset : offset + byte_count] == source[1:]
        assert not any(medium.blocks[offset + byte_count : offset + byte_count + 100])
    await region.close()


async def test_a_flush_promises_only_what_the_server_said(medium: PmemMedium) -> None:
    for durable in (False, True):
        description = msgspec.structs.replace(describe(medium), durable=durable)
        region = PersistentRegion(description, os.dup(medium.shared_fd))
        assert await region.flush() is durable
        await region.close()


async def test_a_read_stays_valid_after_the_region_was_closed(medium: PmemMedium) -> None:
    region = PersistentRegion(describe(medium), os.dup(medium.shared_fd))
    await region.write(100, b"kept")
    view = await region.read(100, 4)
    await region.close()
    assert view == b"kept"
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 0  # type: ignore[index]


@pytest.mark.parametrize(
    "change",
    [
        {"segment_bytes": 0},
        {"segment_bytes": 4 * MIB - 4096},
        {"segment_bytes": 1 << 40},
        {"segment_offsets": ()},
        {"segment_offsets": (2 * MIB, 6 * MIB)},
        {"segment_offsets": (2 * MIB, 6 * MIB, -2 * MIB)},
        {"segment_offsets": (2 * MIB, 6 * MIB, 10 * MIB + 4096)},
        {"segment_offsets": (2 * MIB, 6 * MIB, 1 << 40)},
        {"block_count": 1 << 30},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_the_file_is_refused(
    medium: PmemMedium, change: dict[str, object]
) -> None:
    description = msgspec.structs.replace(describe(medium), **change)
    fd = os.dup(medium.shared_fd)
    with pytest.raises(ProtocolError):
        PersistentRegion(description, fd)
    os.close(fd)


def test_what_cannot_be_mapped_durably_is_refused(medium: PmemMedium) -> None:
    description = msgspec.structs.replace(describe(medium), map_sync=True)
    fd = os.dup(medium.shared_fd)
    with pytest.raises(NotSupportedError, match="MAP_SYNC"):
        PersistentRegion(description, fd)
    os.close(fd)


def test_without_the_library_nothing_is_attached(
    medium: PmemMedium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libpmem, "missing", Library("libpmem-absent.so", "libpmem1").missing)
    fd = os.dup(medium.shared_fd)
    with pytest.raises(NotSupportedError, match="Debian package libpmem1"):
        PersistentRegion(describe(medium), fd)
    os.close(fd)
