"""Memory of direct I/O is used again: nothing keeps a buffer once its request is done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from crailfs.device_io.buffers import AlignedBuffers
from crailfs.device_io.direct_file import DirectFile, open_direct
from crailfs.units import KIB, MIB


@pytest.fixture
def file() -> Iterator[DirectFile]:
    # pytest's own directory may be on a tmpfs, which has no direct I/O.
    path = Path("/var/tmp", f"crailfs-test-{os.getpid()}")
    plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(plain, 16 * MIB)
        descriptor = open_direct(plain)
    finally:
        os.close(plain)
        path.unlink()
    opened = DirectFile(descriptor)
    yield opened
    opened.close()
    os.close(descriptor)


async def test_requests_use_the_same_memory_again(file: DirectFile) -> None:
    data = memoryview(bytes(MIB))
    for _ in range(8):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(file.write, number * MIB, data)
        view = await file.read_view(0, MIB)
        assert view == data
        del view
    buffers = file._buffers
    assert buffers.taken_count == 0
    assert buffers.idle_bytes == 4 * MIB


def test_a_size_in_use_takes_the_place_of_one_that_was() -> None:
    buffers = AlignedBuffers(idle_max_bytes=4 * MIB)
    taken = [buffers.take(MIB) for _ in range(4)]
    taken.clear()
    assert buffers.idle_bytes == 4 * MIB
    small = [buffers.take(64 * KIB) for _ in range(16)]
    small.clear()
    assert buffers.idle_bytes <= 4 * MIB
    before = buffers.made_count
    small = [buffers.take(64 * KIB) for _ in range(16)]
    assert buffers.made_count == before


def test_no_more_is_kept_than_was_said() -> None:
    buffers = AlignedBuffers(idle_max_bytes=4 * MIB)
    taken = [buffers.take(MIB) for _ in range(8)]
    assert buffers.taken_count == 8
    taken.clear()
    assert buffers.taken_count == 0
    assert buffers.idle_bytes == 4 * MIB
