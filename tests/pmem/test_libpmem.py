"""The binding of libpmem, and mappings of segments, against files that are no persistent memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.errors import NotSupportedError
from crailfs.pmem import libpmem
from crailfs.pmem.libpmem import MemcpyFlag
from crailfs.pmem.library import OVERRIDES, Library
from crailfs.pmem.mapping import LARGE_PAGE_BYTES, SegmentMapping

SIZE = 4 * LARGE_PAGE_BYTES


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "file"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_maps_a_whole_file_and_says_that_it_is_no_persistent_memory(path: Path) -> None:
    mapping = libpmem.map_file(path)
    assert mapping.byte_count == SIZE
    assert not mapping.is_pmem
    assert not libpmem.is_pmem(mapping.address, SIZE)
    libpmem.memcpy(mapping.address + 100, b"written")
    libpmem.msync(mapping.address, 200)
    assert path.read_bytes()[100:107] == b"written"
    libpmem.unmap(mapping)
    assert path.name not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_not_there_is_named(directory: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        libpmem.map_file(directory / "absent")
    assert raised.value.filename == str(directory / "absent")


@pytest.mark.parametrize("flag", list(MemcpyFlag))
@pytest.mark.parametrize("byte_count", [0, 1, 63, 64, 65, 255, 257, 4096, 100_001])
def test_memcpy_copies_all_kinds_of_buffers(fd: int, flag: MemcpyFlag, byte_count: int) -> None:
    mapping = SegmentMapping(fd, [0], SIZE, SIZE, synchronous=False)
    source = os.urandom(byte_count)
    for offset, buffer in enumerate((source, bytearray(source), memoryview(b"x" + source)[1:]), 13):
        libpmem.memset(mapping.address, 0xEE, byte_count + 100)
        libpmem.memcpy(mapping.address + offset, buffer, flag)
        libpmem.drain()
        assert bytes(mapping.view[: byte_count + 100]) == (
            b"\xee" * offset + source + b"\xee" * (100 - offset)
        )


def test_memcpy_refuses_what_has_gaps(fd: int) -> None:
    mapping = SegmentMapping(fd, [0], SIZE, SIZE, synchronous=False)
    with pytest.raises(BufferError):
        libpmem.memcpy(mapping.address, memoryview(bytes(100))[::2])


def test_segments_follow_each_other_in_their_order(fd: int) -> None:
    offsets = [2 * LARGE_PAGE_BYTES, 0, LARGE_PAGE_BYTES]
    mapping = SegmentMapping(
        fd, offsets, LARGE_PAGE_BYTES, 2 * LARGE_PAGE_BYTES + 5, synchronous=False
    )
    assert len(mapping.view) == 2 * LARGE_PAGE_BYTES + 5
    assert mapping.address % LARGE_PAGE_BYTES == 0
    mapping.view[LARGE_PAGE_BYTES - 3 : LARGE_PAGE_BYTES + 3] = b"abcdef"
    mapping.view[-1] = ord("z")
    assert os.pread(fd, 3, 3 * LARGE_PAGE_BYTES - 3) == b"abc"
    assert os.pread(fd, 3, 0) == b"def"
    assert os.pread(fd, 1, LARGE_PAGE_BYTES + 4) == b"z"


def test_a_mapping_lives_as_long_as_its_views(fd: int, path: Path) -> None:
    mapping = SegmentMapping(fd, [0], SIZE, SIZE, synchronous=False)
    mapping.view[5] = 7
    view = mapping.view.toreadonly()[4:8]
    del mapping
    gc.collect()
    assert bytes(view) == b"\0\7\0\0"
    assert str(path) in Path("/proc/self/maps").read_text()
    del view
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_no_file_here_is_mapped_synchronously(fd: int) -> None:
    with pytest.raises(OSError) as raised:
        SegmentMapping(fd, [0], SIZE, SIZE, synchronous=True)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_a_missing_library_is_named_with_its_package() -> None:
    absent = Library("libabsent.so.7", "libabsent7")
    reason = absent.missing()
    assert reason is not None and "Debian package libabsent7" in reason
    with pytest.raises(NotSupportedError, match=r"libabsent\.so\.7"):
        absent.load()


def test_the_environment_cannot_make_memory_persistent(path: Path) -> None:
    program = (
        "import sys, pathlib; from crailfs.pmem import libpmem;"
        "mapping = libpmem.map_file(pathlib.Path(sys.argv[1])); print(mapping.is_pmem)"
    )
    environment = os.environ | dict.fromkeys(OVERRIDES, "1")
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "False\n"
    for name in OVERRIDES:
        assert f"{name} is ignored" in done.stderr


def test_memcpy_shares_no_types_with_other_bindings(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes.pythonapi.PyBuffer_Release, "argtypes", (ctypes.c_char_p,))
    mapping = SegmentMapping(fd, [0], SIZE, SIZE, synchronous=False)
    libpmem.memcpy(mapping.address, b"copied")
    assert mapping.view[:6] == b"copied"
