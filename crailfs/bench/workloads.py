"""The workloads of ``crail bench mount``: plain system calls on a directory.

A session is one worker's life on one directory (see ``workers.py``). Loops are as short as Python
allows; what they cost themselves (about 1 us an operation) is in every directory's figure.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from crailfs.bench.workers import Phase
from crailfs.units import KIB, MIB

SMALL_FILE_BYTES: Final = 4 * KIB
STREAM_CHUNK_BYTES: Final = MIB


class Sizes(NamedTuple):
    """How much each workload does, all of its processes together."""

    stream_bytes: int = 256 * MIB
    random_reads: int = 8_000
    small_files: int = 2_000
    stat_rounds: int = 20
    """How often each small file is asked for."""
    listed_entries: int = 10_000
    listings: int = 4

    def scaled(self, factor: float) -> Sizes:
        """``factor`` times the work; the large directory keeps its size."""
        return self._replace(
            stream_bytes=max(round(self.stream_bytes * factor), STREAM_CHUNK_BYTES),
            random_reads=max(round(self.random_reads * factor), 1),
            small_files=max(round(self.small_files * factor), 1),
        )


class Workload(NamedTuple):
    name: str
    unit: str
    """``MB/s`` (10^6 bytes, more is better) or ``us`` (wall time by operation, less is better)."""
    meaning: str


WORKLOADS: Final = (
    Workload("write 1 MiB", "MB/s", "new file, 1 MiB a call (page-aligned), fsync at the end"),
    Workload("read 1 MiB cold", "MB/s", "after POSIX_FADV_DONTNEED on the whole file"),
    Workload("read 1 MiB warm", "MB/s", "opened again after it was read whole"),
    Workload(
        "random read 4 KiB",
        "us",
        "after POSIX_FADV_DONTNEED, POSIX_FADV_RANDOM, no page twice: a trip through FUSE each",
    ),
    Workload("create+write+close", "us", "new file of 4 KiB"),
    Workload("rename", "us", "to a new name in the same directory"),
    Workload("unlink", "us", "of a file of 4 KiB"),
    Workload("stat", "us", "of an entry that was asked for before"),
    Workload("open+read+close", "us", "of a file of 4 KiB that was read before"),
    Workload("readdir", "us", "of one directory of 10,000 entries, names and types, by listing"),
)
UNITS: Final = {workload.name: workload.unit for workload in WORKLOADS}


def stream(place: Path, sizes: Sizes, process_count: int, index: int) -> Iterator[Phase]:
    """One file a worker: written and read in a row and at random."""
    path = place / f"stream-{index}"
    chunk_count = max(sizes.stream_bytes // process_count // STREAM_CHUNK_BYTES, 1)
    # On page boundaries, as dd, fio and Java's direct buffers have them.
    chunk = mmap.mmap(-1, STREAM_CHUNK_BYTES)
    chunk.write(random.Random(index).randbytes(STREAM_CHUNK_BYTES))
    buffer = mmap.mmap(-1, STREAM_CHUNK_BYTES)

    def write() -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        for _ in range(chunk_count):
            written = os.write(descriptor, chunk)
            if written != STREAM_CHUNK_BYTES:
                raise OSError(f"write returned {written}")
        os.fsync(descriptor)
        os.close(descriptor)
        return chunk_count * STREAM_CHUNK_BYTES

    def read() -> int:
        descriptor = os.open(path, os.O_RDONLY)
        amount = 0
        while count := os.readv(descriptor, [buffer]):
            amount += count
        os.close(descriptor)
        return amount

    def read_at_random() -> int:
        for offset in offsets:
            os.preadv(descriptor, [page], offset)
        return len(offsets)

    try:
        yield Phase("write 1 MiB", write)
        drop_cache(path)
        yield Phase("read 1 MiB cold", read)
        yield Phase("read 1 MiB warm", read)
        drop_cache(path)
        page = bytearray(SMALL_FILE_BYTES)
        page_count = chunk_count * STREAM_CHUNK_BYTES // SMALL_FILE_BYTES
        read_count = min(max(sizes.random_reads // process_count, 1), page_count)
        pages = random.Random(index).sample(range(page_count), read_count)
        offsets = [number * SMALL_FILE_BYTES for number in pages]
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield Phase("random read 4 KiB", read_at_random)
        os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)


def small_files(place: Path, sizes: Sizes, process_count: int, index: int) -> Iterator[Phase]:
    """Each worker makes, renames and removes files in a directory of its own."""
    directory = place / f"small-{index}"
    directory.mkdir()
    count = max(sizes.small_files // process_count, 1)
    names = [f"{directory}/file-{number}" for number in range(count)]
    new_names = [f"{directory}/renamed-{number}" for number in range(count)]
    data = random.Random(index).randbytes(SMALL_FILE_BYTES)

    def create() -> int:
        for name in names:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, data)
            os.close(descriptor)
        return count

    def rename() -> int:
        for name, new_name in zip(names, new_names, strict=True):
            os.rename(name, new_name)
        return count

    def unlink() -> int:
        for name in new_names:
            os.unlink(name)
        return count

    try:
        yield Phase("create+write+close", create)
        yield Phase("rename", rename)
        yield Phase("unlink", unlink)
    finally:
        shutil.rmtree(directory)


def make_tree(place: Path, sizes: Sizes) -> None:
    """What ``tree`` looks at; made once for all of its rounds."""
    data = random.Random(0).randbytes(SMALL_FILE_BYTES)
    (place / "files").mkdir()
    for number in range(sizes.small_files):
        (place / "files" / f"file-{number}").write_bytes(data)
    (place / "listed").mkdir()
    for number in range(sizes.listed_entries):
        os.mknod(place / "listed" / f"entry-{number:06d}", 0o600)


def tree(place: Path, sizes: Sizes, process_count: int, index: int) -> Iterator[Phase]:
    """Each worker looks at its share of the files, and at the whole of the large directory."""
    names = [
        f"{place}/files/file-{number}" for number in range(index, sizes.small_files, process_count)
    ]
    listed = f"{place}/listed"
    buffer = bytearray(2 * SMALL_FILE_BYTES)

    def stat() -> int:
        for _ in range(sizes.stat_rounds):
            for name in names:
                os.stat(name)
        return sizes.stat_rounds * len(names)

    def read() -> int:
        for name in names:
            descriptor = os.open(name, os.O_RDONLY)
            count = os.readv(descriptor, [buffer])
            os.close(descriptor)
            if count != SMALL_FILE_BYTES:
                raise OSError(f"{name}: read {count} bytes")
        return len(names)

    def list_directory() -> int:
        for _ in range(sizes.listings):
            with os.scandir(listed) as entries:
                count = sum(1 for _ in entries)
            if count != sizes.listed_entries:
                raise OSError(f"{listed}: {count} entries of {sizes.listed_entries}")
        return sizes.listings

    for name in names:
        os.stat(name)
    yield Phase("stat", stat)
    read()
    yield Phase("open+read+close", read)
    yield Phase("readdir", list_directory)


SESSIONS: Final[tuple[Callable[[Path, Sizes, int, int], Iterator[Phase]], ...]] = (
    stream,
    small_files,
    tree,
)


def drop_cache(path: Path) -> None:
    """Make the kernel forget the file's clean pages. tmpfs has no other place for them and keeps
    them: there a cold read is a warm one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_fraction(path: Path) -> float:
    """The part of the file's pages that lie in the page cache, 0 to 1.

    Raises:
        OSError: mincore(2) failed.
    """
    size_bytes = path.stat().st_size
    page_count = -(-size_bytes // mmap.PAGESIZE)
    with path.open("rb") as file, _private_map(file.fileno(), size_bytes) as mapping:
        states = (ctypes.c_ubyte * page_count)()
        start = ctypes.c_char.from_buffer(mapping)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            address = ctypes.c_void_p(ctypes.addressof(start))
            if libc.mincore(address, ctypes.c_size_t(size_bytes), states) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))
        finally:
            # The mapping cannot be closed while an object points into it.
            del start
    return sum(state & 1 for state in states) / page_count


def cache_after_drop(place: Path) -> float:
    """How much of a file that was just read the directory's file system keeps in the page cache
    after ``drop_cache``: says whether its cold reads are cold."""
    path = place / "cached"
    path.write_bytes(random.Random(0).randbytes(4 * MIB))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    try:
        drop_cache(path)
        return cached_fraction(path)
    finally:
        path.unlink()


def _private_map(descriptor: int, size_bytes: int) -> mmap.mmap:
    return mmap.mmap(
        descriptor, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
