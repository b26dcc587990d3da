"""What the FUSE binding does not carry: each is refused with a stable errno (see the README), or
the kernel or the C library does it by other means."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)

FS_IOC_GETFLAGS = 0x80086601
FIEMAP_OR_ANY_OTHER = 0xC020660B


@pytest.fixture
def fd(place: Path) -> Iterator[int]:
    path = place / "file"
    path.write_bytes(b"x" * 1000)
    descriptor = os.open(path, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    "mode", [0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
             FALLOC_FL_ZERO_RANGE],
)  # fmt: skip
def test_fallocate_is_not_supported(fd: int, mode: int) -> None:
    with pytest.raises(OSError) as caught:
        fallocate(fd, mode, 0, 4096)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert os.fstat(fd).st_size == 1000


def test_posix_fallocate_works_by_writing_zeros(fd: int) -> None:
    os.posix_fallocate(fd, 0, 5000)
    assert os.fstat(fd).st_size == 5000
    assert os.pread(fd, 5000, 0) == b"x" * 1000 + bytes(4000)


def test_seeking_holes_sees_one_range_of_data(fd: int) -> None:
    os.ftruncate(fd, 1_000_000)
    assert os.lseek(fd, 10, os.SEEK_DATA) == 10
    assert os.lseek(fd, 10, os.SEEK_HOLE) == 1_000_000
    with pytest.raises(OSError) as caught:
        os.lseek(fd, 1_000_000, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO


def test_copy_file_range_is_done_by_the_kernel(fd: int, place: Path) -> None:
    with (place / "copy").open("wb") as target:
        assert os.copy_file_range(fd, target.fileno(), 1000) == 1000
    assert (place / "copy").read_bytes() == b"x" * 1000


def test_temporary_files_without_a_name_are_not_supported(place: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.open(place, os.O_TMPFILE | os.O_RDWR)
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("request_code", [FS_IOC_GETFLAGS, FIEMAP_OR_ANY_OTHER])
def test_ioctls_are_not_supported(fd: int, request_code: int) -> None:
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(fd, request_code, bytes(64))
    assert caught.value.errno in (errno.ENOTTY, errno.EOPNOTSUPP)


def test_device_nodes_cannot_be_opened(place: Path) -> None:
    path = place / "null"
    os.mknod(path, 0o20666, os.makedev(1, 3))
    with pytest.raises(OSError) as caught:
        os.open(path, os.O_WRONLY)
    assert caught.value.errno == errno.EACCES  # the mount is nodev
