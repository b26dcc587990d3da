"""Direct I/O, by the kernel's ring and in threads: the same to whoever uses it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from crailfs.device_io import AlignedBuffers, DirectFile, engine, engine_name, open_direct
from crailfs.device_io.buffers import address_of
from crailfs.device_io.ring import REQUESTS_MAX
from crailfs.device_io.threads import Threads
from crailfs.errors import InvalidError
from crailfs.units import KIB, MIB

SIZE = 4 * MIB


@pytest.fixture(params=["io_uring", "threads"])
def fd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """A file of zeros, and the way it is accessed by from here on."""
    if request.param == "threads":
        monkeypatch.setattr(engine, "engine_name", lambda: "threads")
    elif engine_name() != "io_uring":
        pytest.skip("this kernel allows no io_uring")
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


@pytest.fixture
def file(fd: int) -> Iterator[DirectFile]:
    file = DirectFile(fd)
    yield file
    file.close()


def aligned(data: bytes) -> memoryview:
    buffer = AlignedBuffers().take(len(data))
    buffer[:] = data
    return buffer


@pytest.mark.parametrize("byte_count", [1, 511, 4096, 5000, 64 * KIB, MIB + 1])
@pytest.mark.parametrize("is_aligned", [True, False])
async def test_reads_back_and_pads_with_zeros(
    file: DirectFile, byte_count: int, is_aligned: bool
) -> None:
    await file.write(0, memoryview(b"\xff" * (2 * MIB)))
    data = os.urandom(byte_count)
    await file.write(8192, aligned(data) if is_aligned else memoryview(data))
    assert bytes(await file.read_view(8192, byte_count)) == data
    padding = -byte_count % 4096
    assert bytes(await file.read_view(8192 + byte_count, padding + 1)) == bytes(padding) + b"\xff"
    assert bytes(await file.read_view(8191, 1)) == b"\xff"


@pytest.mark.parametrize(("position", "byte_count"), [(0, 4096), (1, 10), (4095, 2), (100, 9000)])
async def test_reads_any_bytes_into_any_memory(
    file: DirectFile, position: int, byte_count: int
) -> None:
    content = os.urandom(64 * KIB)
    await file.write(0, memoryview(content))
    for memory in (bytearray(byte_count + 3), aligned(bytes(byte_count + 3))):
        inside = memoryview(memory)[:byte_count]
        await file.read(position, inside)
        assert inside == content[position : position + byte_count]
        assert bytes(memory[byte_count:]) == bytes(3)


async def test_a_write_begins_at_a_sector(file: DirectFile) -> None:
    with pytest.raises(InvalidError, match="multiple of 4096"):
        await file.write(512, memoryview(bytes(4096)))


async def test_bytes_behind_the_end_are_an_error_and_others_go_on(file: DirectFile) -> None:
    failed = []

    async def read_behind() -> None:
        with pytest.raises(OSError) as caught:
            await file.read_view(SIZE - 4096, 8192)
        failed.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(read_behind)
            nursery.start_soon(file.read_view, 0, 4096)
    assert failed == [errno.EIO] * 5


async def test_each_request_has_its_own_error(fd: int, tmp_path: Path) -> None:
    """A device that refuses: a descriptor that may not be written to."""
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    file = DirectFile(read_only)
    with pytest.raises(OSError) as caught:
        await file.write(0, memoryview(bytes(4096)))
    assert caught.value.errno == errno.EBADF
    assert bytes(await file.read_view(0, 10)) == bytes(10)
    file.close()
    os.close(read_only)


@pytest.mark.parametrize("seed", range(3))
async def test_more_at_once_than_a_ring_holds_do_not_mix(file: DirectFile, seed: int) -> None:
    rng = random.Random(seed)
    slots = SIZE // (16 * KIB)
    expected: dict[int, bytes] = {}

    async def work(worker: int) -> None:
        mine = range(worker, slots, 2 * REQUESTS_MAX)
        for _ in range(4):
            slot = rng.choice(mine)
            data = rng.randbytes(rng.randint(1, 16 * KIB))
            memory = aligned(data) if rng.random() < 0.5 else memoryview(data)
            await file.write(slot * 16 * KIB, memory)
            expected[slot] = data
            found = await file.read_view(slot * 16 * KIB, len(data))
            assert bytes(found) == data

    async with trio.open_nursery() as nursery:
        for worker in range(2 * REQUESTS_MAX):
            nursery.start_soon(work, worker % slots)
    for slot, data in expected.items():
        assert bytes(await file.read_view(slot * 16 * KIB, len(data))) == data


async def test_a_cancelled_write_goes_on_to_its_end(file: DirectFile) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await file.write(0, memoryview(b"x" * MIB))
    assert bytes(await file.read_view(0, MIB)) == b"x" * MIB


async def test_a_closed_file_takes_nothing_more(fd: int) -> None:
    file = DirectFile(fd)
    await file.write(0, memoryview(b"x"))
    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(file.write, index * 64 * KIB, memoryview(b"y" * 64 * KIB))
        await trio.testing.wait_all_tasks_blocked()
        await file.drain()
    file.close()
    with pytest.raises(OSError, match="closed"):
        await file.read_view(0, 1)
    again = DirectFile(fd)
    assert bytes(await again.read_view(19 * 64 * KIB, 4096)) == b"y" * 4096
    again.close()


async def test_closing_waits_for_what_the_kernel_has_under_way(fd: int) -> None:
    file = DirectFile(fd)
    await file.sync()
    if isinstance(file._engine, Threads):
        pytest.skip("threads are waited for by drain")
    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(file.write, index * 64 * KIB, memoryview(b"z" * 64 * KIB))
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        file.close()
    again = DirectFile(fd)
    assert bytes(await again.read_view(0, 20 * 64 * KIB)) == b"z" * 20 * 64 * KIB
    again.close()


@pytest.mark.usefixtures("fd")
async def test_waiting_for_a_device_takes_no_processor() -> None:
    """A pipe stands for a device that answers late."""
    ring = engine.open_engine()
    if isinstance(ring, Threads):
        pytest.skip("preadv does not read pipes")
    receive, send = os.pipe()
    got = bytearray(4)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            view = memoryview(got)
            await ring.move(receive, (1 << 64) - 1, view, address_of(view), writing=False)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        used_s = -sum(os.times()[:2])
        await trio.sleep(0.3)
        used_s += sum(os.times()[:2])
        os.write(send, b"late")
    assert got == b"late" and used_s < 0.1
    ring.close()
    os.close(receive)
    os.close(send)


async def test_serves_one_event_loop_after_another(fd: int) -> None:
    file = DirectFile(fd)

    def in_another_loop(text: bytes) -> bytes:
        async def use() -> bytes:
            await file.write(0, memoryview(text))
            return bytes(await file.read_view(0, len(text)))

        return trio.run(use)

    for text in (b"one", b"two"):
        assert await trio.to_thread.run_sync(in_another_loop, text) == text
    file.close()


async def test_keeps_no_memory_of_what_is_done(file: DirectFile) -> None:
    watched = bytearray(8192)
    await file.read(0, memoryview(watched))
    page = aligned(bytes(4096))
    for _ in range(3):
        await file.write(0, page)
        await file.read(0, page)
    page.release()  # BufferError if somebody holds on to it
    watched.append(1)


def test_buffers_are_used_again_when_the_last_view_is_dropped() -> None:
    buffers = AlignedBuffers(idle_max_bytes=256 * KIB)
    view = buffers.take(100 * KIB)
    view[:4] = b"mark"
    part = view[2:10]
    del view
    other = buffers.take(100 * KIB)
    assert bytes(other[:4]) == bytes(4)
    del part
    assert bytes(buffers.take(90 * KIB)[:4]) == b"mark"


def test_a_host_without_io_uring_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    engine.engine_name.cache_clear()
    monkeypatch.setattr(engine, "Uring", forbidden)
    try:
        assert engine_name() == engine_name() == "threads"
        assert isinstance(engine.open_engine(), Threads)
        assert caplog.text.count("there is no io_uring here (Operation not permitted)") == 1
    finally:
        engine.engine_name.cache_clear()


def test_open_direct_holds_no_lock(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    direct = open_direct(fd)
    os.close(fd)
    another = os.open(path, os.O_RDWR)
    fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for each in (direct, another):
        os.close(each)
