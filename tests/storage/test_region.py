"""Bounds and generations of a region."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.config import RegionConfig
from crailfs.errors import FencedError, InvalidError, TryAgainError
from crailfs.limits import PAYLOAD_MAX_BYTES
from crailfs.records import Tier
from crailfs.units import KIB, MIB
from storage_server.buffers import Buffers
from storage_server.media import open_medium
from storage_server.region import FAILED_REPORTED_MAX, PROVISION_MARGIN_BYTES, Region

BLOCK = 64 * KIB


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    config = RegionConfig(tier=Tier.DISK, path=tmp_path / "region", size_bytes=8 * MIB)
    medium = open_medium(config, cluster_id=b"c" * 16, block_size_bytes=BLOCK, known_uuid=None)
    yield Region(medium)
    medium.close()


@pytest.mark.parametrize(
    ("offset", "byte_count"),
    [
        (-1, 1),
        (-BLOCK, 2 * BLOCK),
        (8 * MIB, 1),
        (8 * MIB - 1, 2),
        (1 << 64, 1),
        (0, 0),
        (0, -1),
        (0, PAYLOAD_MAX_BYTES + 1),
    ],
)
def test_bytes_outside_are_refused(region: Region, offset: int, byte_count: int) -> None:
    with pytest.raises(InvalidError):
        region.check_range(offset, byte_count)


def test_bytes_inside_are_accepted_up_to_the_last(region: Region) -> None:
    region.check_range(0, PAYLOAD_MAX_BYTES)
    region.check_range(8 * MIB - 1, 1)


def test_memory_that_is_not_provisioned_is_refused(tmp_path: Path) -> None:
    config = RegionConfig(tier=Tier.MEMORY, path=tmp_path / "region", size_bytes=8 * MIB)
    medium = open_medium(config, cluster_id=b"c" * 16, block_size_bytes=BLOCK, known_uuid=None)
    region = Region(medium)
    medium.provision(2)
    region.check_range(BLOCK, BLOCK)
    with pytest.raises(InvalidError, match="131072 usable"):
        region.check_range(BLOCK + 1, BLOCK)
    medium.close()


def test_an_older_generation_is_refused_in_every_block_that_it_touches(region: Region) -> None:
    region.claim(0, 10 * BLOCK, 5)
    region.claim(4 * BLOCK + 17, 1, 9)
    region.claim(0, 4 * BLOCK, 5)
    region.claim(5 * BLOCK, BLOCK, 5)
    for offset, byte_count in ((4 * BLOCK, 1), (3 * BLOCK, BLOCK + 1), (0, 10 * BLOCK)):
        with pytest.raises(FencedError, match=r"block 4 .* generation 9"):
            region.claim(offset, byte_count, 8)
    region.claim(4 * BLOCK, BLOCK, 9)


def test_a_refused_claim_changes_nothing(region: Region) -> None:
    region.claim(BLOCK, BLOCK, 9)
    with pytest.raises(FencedError):
        region.claim(0, 2 * BLOCK, 8)
    region.claim(0, BLOCK, 7)


@pytest.mark.parametrize("generation", [0, -1, 1 << 64])
def test_a_generation_that_cannot_be_is_refused(region: Region, generation: int) -> None:
    with pytest.raises(InvalidError):
        region.claim(0, 1, generation)


def test_high_water_only_rises(region: Region) -> None:
    region.raise_high_water(10)
    region.raise_high_water(3)
    assert region.high_water_blocks == 10
    assert region.wanted_blocks == 10 + PROVISION_MARGIN_BYTES // BLOCK


def test_buffers_are_bounded_and_come_back_when_the_last_view_goes() -> None:
    buffers = Buffers(max_bytes=100)
    part = buffers.take(60)[10:20]
    with pytest.raises(TryAgainError):
        buffers.take(41)
    assert buffers.held_bytes == 60
    del part
    assert buffers.held_bytes == 0
    assert len(buffers.take(100)) == 100


def test_failed_blocks_are_named_in_turns_when_there_are_too_many(region: Region) -> None:
    region.failed_blocks |= {9, 3, 7}
    assert region.next_state().failed_blocks == (3, 7, 9)
    assert region.next_state().failed_blocks == (3, 7, 9)
    region.failed_blocks |= set(range(2 * FAILED_REPORTED_MAX + 100))
    for _ in range(2):
        named = [region.next_state().failed_blocks for _ in range(3)]
        assert all(len(set(blocks)) == FAILED_REPORTED_MAX for blocks in named)
        assert set().union(*named) == region.failed_blocks
