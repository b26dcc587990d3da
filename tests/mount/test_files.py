"""Bytes: open flags, reading and writing, holes, truncation, mappings, copies inside the kernel."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.support.mounts import in_child

BLOCK = 64 * 1024


def test_written_bytes_are_read_back_across_block_borders(place: Path) -> None:
    data = random.Random(1).randbytes(3 * BLOCK + 4321)
    path = place / "file"
    path.write_bytes(data)
    assert path.stat().st_size == len(data)
    assert path.read_bytes() == data
    with path.open("rb", buffering=0) as file:
        for offset, count in ((0, 1), (BLOCK - 1, 2), (BLOCK, BLOCK), (3 * BLOCK, 9999)):
            assert os.pread(file.fileno(), count, offset) == data[offset : offset + count]
    assert path.stat().st_blocks * 512 >= len(data)


def test_overwriting_in_the_middle_keeps_the_rest(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"a" * (2 * BLOCK))
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"XYZ", BLOCK - 1)
    expected = b"a" * (BLOCK - 1) + b"XYZ" + b"a" * (BLOCK - 2)
    assert path.read_bytes() == expected


def test_append_goes_to_the_end_whoever_wrote_last(place: Path) -> None:
    path = place / "log"
    first = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    second = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for turn in range(20):
            os.write(first if turn % 2 else second, b"%02d" % turn)
        os.lseek(first, 0, os.SEEK_SET)
        os.write(first, b"end")
    finally:
        os.close(first)
        os.close(second)
    assert path.read_bytes() == b"".join(b"%02d" % turn for turn in range(20)) + b"end"


def test_exclusive_creation(place: Path) -> None:
    path = place / "file"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    with pytest.raises(FileExistsError):
        os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    (place / "link").symlink_to(place / "nowhere")
    with pytest.raises(FileExistsError):
        os.open(place / "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def test_open_for_truncation_empties_the_file_and_changes_its_time(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"x" * 100_000)
    os.utime(path, ns=(1, 1))
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0
    assert path.stat().st_mtime_ns > 1
    assert path.read_bytes() == b""


def test_open_refuses_what_does_not_fit(place: Path) -> None:
    (place / "directory").mkdir()
    (place / "file").touch()
    (place / "loop").symlink_to("loop")
    for name, flags, number in (
        ("missing", os.O_RDONLY, errno.ENOENT),
        ("directory", os.O_WRONLY, errno.EISDIR),
        ("file", os.O_DIRECTORY, errno.ENOTDIR),
        ("file/below", os.O_RDONLY, errno.ENOTDIR),
        ("loop", os.O_RDONLY, errno.ELOOP),
        ("loop", os.O_RDONLY | os.O_NOFOLLOW, errno.ELOOP),
    ):
        with pytest.raises(OSError) as caught:
            os.open(place / name, flags)
        assert caught.value.errno == number, name


def test_a_descriptor_does_only_what_it_was_opened_for(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file, pytest.raises(OSError) as caught:
        os.write(file.fileno(), b"x")
    assert caught.value.errno == errno.EBADF
    with path.open("ab") as file, pytest.raises(OSError) as caught:
        os.read(file.fileno(), 1)
    assert caught.value.errno == errno.EBADF


def test_direct_io_sees_and_shows_what_buffered_io_does(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"b" * (2 * BLOCK))
    buffer = mmap.mmap(-1, BLOCK)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.preadv(fd, [buffer], BLOCK) == BLOCK
        assert buffer[:] == b"b" * BLOCK
        buffer[:] = b"d" * BLOCK
        assert os.pwritev(fd, [buffer], BLOCK) == BLOCK
        assert path.read_bytes() == b"b" * BLOCK + b"d" * BLOCK
    finally:
        os.close(fd)


def test_a_hole_reads_as_zeros_and_takes_no_blocks(place: Path) -> None:
    path = place / "sparse"
    end = 10 * 1024 * 1024 * 1024
    with path.open("wb", buffering=0) as file:
        os.pwrite(file.fileno(), b"end", end)
        os.pwrite(file.fileno(), b"middle", 5_000_000)
    assert path.stat().st_size == end + 3
    assert path.stat().st_blocks * 512 <= 2 * BLOCK
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 8, 4_999_999) == b"\0middle\0"
        assert os.pread(file.fileno(), 100_000, 1 << 30) == bytes(100_000)
        assert os.pread(file.fileno(), 100, end - 2) == b"\0\0end"


def test_truncation_both_ways_never_brings_old_bytes_back(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"s" * (3 * BLOCK))
    with path.open("r+b", buffering=0) as file:
        os.ftruncate(file.fileno(), BLOCK + 10)
        assert os.fstat(file.fileno()).st_size == BLOCK + 10
        os.ftruncate(file.fileno(), 3 * BLOCK)
        kept = b"s" * (BLOCK + 10) + bytes(2 * BLOCK - 10)
        assert os.pread(file.fileno(), 4 * BLOCK, 0) == kept
    assert path.read_bytes() == kept
    os.truncate(path, 0)
    os.truncate(path, 100)
    assert path.read_bytes() == bytes(100)
    with pytest.raises(IsADirectoryError):
        os.truncate(place, 0)


def test_a_write_beyond_the_end_after_a_truncation_leaves_zeros_between(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"s" * 1000)
    with path.open("r+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 10)
        os.pwrite(file.fileno(), b"e", 500)
    assert path.read_bytes() == b"s" * 10 + bytes(490) + b"e"


def test_sync_calls_succeed_on_files_and_directories(place: Path) -> None:
    with (place / "file").open("wb", buffering=0) as file:
        os.write(file.fileno(), b"x" * 100_000)
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_processes_share_a_mapping(place: Path) -> None:
    path = place / "mapped"
    path.write_bytes(bytes(2 * BLOCK))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * BLOCK) as mapping:

        def write_in_the_child() -> None:
            with path.open("r+b") as own, mmap.mmap(own.fileno(), 2 * BLOCK) as view:
                assert view[0:5] == b"mine!"
                view[BLOCK - 2 : BLOCK + 2] = b"both"

        mapping[0:5] = b"mine!"
        in_child(write_in_the_child)
        assert mapping[BLOCK - 2 : BLOCK + 2] == b"both"
        mapping.flush()
    content = path.read_bytes()
    assert content[:5] == b"mine!"
    assert content[BLOCK - 2 : BLOCK + 2] == b"both"


def test_what_a_mapping_wrote_after_close_is_kept(place: Path) -> None:
    path = place / "mapped"
    path.write_bytes(bytes(BLOCK))

    def write_without_a_descriptor() -> None:
        fd = os.open(path, os.O_RDWR)
        view = mmap.mmap(fd, BLOCK)
        os.close(fd)
        view[100:104] = b"late"
        view.close()

    in_child(write_without_a_descriptor)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)  # past the page cache
    try:
        buffer = mmap.mmap(-1, 4096)
        os.preadv(fd, [buffer], 0)
        assert buffer[100:104] == b"late"
    finally:
        os.close(fd)


def test_a_private_mapping_changes_nothing(place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"original")
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=3)
        mapping[:] = b"ORIGINAL"
        mapping.close()
    assert path.read_bytes() == b"original"


def test_sendfile_and_splice(place: Path) -> None:
    data = random.Random(2).randbytes(300_000)
    (place / "from").write_bytes(data)
    with (place / "from").open("rb") as source, (place / "to").open("wb") as target:
        sent = 0
        while sent < len(data):
            sent += os.sendfile(target.fileno(), source.fileno(), sent, len(data) - sent)
    assert (place / "to").read_bytes() == data
    reading, writing = os.pipe()
    try:
        with (place / "from").open("rb") as source, (place / "spliced").open("wb") as target:
            moved = 0
            while moved < len(data):
                count = os.splice(source.fileno(), writing, 60_000, offset_src=moved)
                moved += os.splice(reading, target.fileno(), count, offset_dst=moved)
    finally:
        os.close(reading)
        os.close(writing)
    assert (place / "spliced").read_bytes() == data


def test_random_writes_reads_and_truncations_match_a_local_file(place: Path) -> None:
    seed = 20240501
    print("seed", seed)
    choose = random.Random(seed)
    path = place / "file"
    expected = bytearray()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for _ in range(300):
            offset = choose.randrange(5 * BLOCK)
            action = choose.random()
            if action < 0.5:
                data = choose.randbytes(choose.randrange(1, 2 * BLOCK))
                assert os.pwrite(fd, data, offset) == len(data)
                expected.extend(bytes(max(0, offset - len(expected))))
                expected[offset : offset + len(data)] = data
            elif action < 0.6:
                os.ftruncate(fd, offset)
                del expected[offset:]
                expected.extend(bytes(offset - len(expected)))
            elif action < 0.65:
                os.close(fd)
                fd = os.open(path, os.O_RDWR)
            else:
                count = choose.randrange(2 * BLOCK)
                assert os.pread(fd, count, offset) == expected[offset : offset + count]
    finally:
        os.close(fd)
    assert path.read_bytes() == expected
