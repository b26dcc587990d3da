"""Regions on a real NVMe disk: the whole device, bad sectors, and clients that are killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from crailfs.config import RegionConfig
from crailfs.device_io import AlignedBuffers, engine_name
from crailfs.errors import BusyError, DamagedError
from crailfs.records import HeaderChange, Tier
from crailfs.transports import Transport, connect
from crailfs.units import KIB, MIB
from storage_server.media import Medium, open_medium
from storage_server.server import serve
from tests.lab.media.mapper import Mapped, mapped
from tests.storage.cluster import (
    BLOCK,
    FakeMetadata,
    client_config,
    storage_config,
)

CLUSTER = b"c" * 16


def open_(device: Path, *, overwrite: bool = False) -> Medium:
    config = RegionConfig(tier=Tier.NVME, path=device, size_bytes=1, overwrite=overwrite)
    return open_medium(config, cluster_id=CLUSTER, block_size_bytes=BLOCK, known_uuid=None)


@pytest.fixture
def device(nvme: Path) -> Iterator[Mapped]:
    with mapped(nvme) as device:
        yield device


async def test_a_whole_disk_keeps_blocks_and_headers(nvme: Path) -> None:
    medium = open_(nvme, overwrite=True)
    assert medium.kind == "block device with direct I/O" and engine_name() == "io_uring"
    assert medium.headers is not None
    size = medium.superblock.data_size_bytes
    for offset in (0, size // 2 // MIB * MIB, size - MIB):
        await medium.write(offset, memoryview(bytes([offset % 251 + 1]) * MIB))
    assert await medium.flush()
    medium.headers.apply([HeaderChange(1, 5, 1, 9, 0, 1, 4, 4, bytes(8))], 3)
    await medium.discard(0, 8)
    with pytest.raises(BusyError, match="in use"):
        open_(nvme)
    medium.close()

    again = open_(nvme)
    assert again.superblock == medium.superblock
    assert again.headers is not None and again.headers.applied_sequence == 3
    assert [header.block for header in again.headers.read(0, 10)[0]] == [5]
    buffer = memoryview(bytearray(MIB))
    for offset in (size // 2 // MIB * MIB, size - MIB):
        await again.read(offset, buffer)
        assert buffer == bytes([offset % 251 + 1]) * MIB
    again.close()
    make_file_system = ["mkfs.ext4", "-q", "-F", str(nvme), "16M"]
    await trio.run_process(make_file_system)
    with pytest.raises(BusyError, match="TYPE=ext4"):
        open_(nvme)


@contextlib.asynccontextmanager
async def attached(
    directory: Path, device: Path, name: str
) -> AsyncIterator[tuple[FakeMetadata, Transport, int]]:
    async with FakeMetadata().running(directory) as metadata:
        config = replace(
            storage_config(directory, metadata, ()),
            regions=(RegionConfig(tier=Tier.NVME, path=device, size_bytes=1, overwrite=True),),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, config))
            client = client_config(metadata, name)
            transport = await connect(metadata.server, client, 42, nursery)
            yield metadata, transport, metadata.region_id(Tier.NVME)
            await transport.close()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["local", "tcp"])
async def test_bad_sectors_fail_their_block_alone(
    device: Mapped, tmp_path: Path, name: str
) -> None:
    async with attached(tmp_path, device.path, name) as (metadata, transport, region):
        (placed,) = metadata.regions.values()
        data_offset = _data_offset(device.path)
        assert placed.info.block_count * BLOCK > 500 * MIB
        for block in range(8):
            await transport.write(region, block * BLOCK, 1, bytes([block + 1]) * BLOCK)
        await transport.flush(region)
        bad = data_offset + 3 * BLOCK + 8 * KIB
        device.failing(bad, bad + 4 * KIB)
        with pytest.raises(DamagedError, match="Input/output error"):
            await transport.read(region, 0, 8 * BLOCK)
        with pytest.raises(DamagedError, match="Input/output error"):
            await transport.write(region, 3 * BLOCK, 1, b"x" * BLOCK)
        heartbeat = await metadata.wait_for(lambda _: True)
        assert [state.failed_blocks for state in heartbeat.regions] == [(3,)]
        for block in (0, 1, 2, 4, 5, 6, 7):
            assert await transport.read(region, block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
        device.linear()


def _data_offset(device: Path) -> int:
    """From the superblock's second format."""
    with device.open("rb") as file:
        return int.from_bytes(file.read(72)[60:68], "big")


WRITER = """
import fcntl, os, sys
import trio, trio.testing
from crailfs.device_io import DirectFile

device, life_line = sys.argv[1:]
line = os.open(life_line, os.O_RDWR | os.O_CREAT)
fcntl.flock(line, fcntl.LOCK_EX)
file = DirectFile(os.open(device, os.O_RDWR | os.O_DIRECT), life_line_fd=line)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.write, 1 << 20, memoryview(b"late" * 1024))
        await trio.testing.wait_all_tasks_blocked()
        print("on its way", flush=True)

trio.run(main)
"""


def test_the_life_line_of_a_killed_client_lasts_as_long_as_its_requests(
    device: Mapped, nvme: Path, tmp_path: Path
) -> None:
    before = _direct_read(nvme)
    device.slow_to_write(4_000)
    life_line = tmp_path / "life-line"
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(device.path), str(life_line)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"on its way\n"
    child.kill()
    child.wait()
    assert _direct_read(nvme) == before, "the device is not slow enough for this test"
    with life_line.open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX)
    assert _direct_read(nvme) == b"late" * 1024


def _direct_read(device: Path) -> bytes:
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    buffer = AlignedBuffers().take(4096)
    try:
        os.preadv(fd, [buffer], 1 << 20)
    finally:
        os.close(fd)
    return bytes(buffer)
