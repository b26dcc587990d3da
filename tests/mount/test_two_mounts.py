"""Two mounts of one file system: each has its own kernel caches, and they agree."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

import pytest

BLOCK = 64 * 1024


def test_what_was_written_before_close_is_read_after_open(place: Path, other_place: Path) -> None:
    for turn in range(10):
        here, there = (place, other_place) if turn % 2 else (other_place, place)
        data = b"%d " % turn * 50_000
        (here / "file").write_bytes(data)
        assert (there / "file").read_bytes() == data
        assert (there / "file").stat().st_size == len(data)


def test_an_overwrite_of_equal_size_reaches_pages_cached_elsewhere(
    place: Path, other_place: Path
) -> None:
    (place / "file").write_bytes(b"1" * (3 * BLOCK))
    assert (other_place / "file").read_bytes() == b"1" * (3 * BLOCK)
    with (place / "file").open("r+b") as file:
        file.seek(BLOCK)
        file.write(b"2" * 10)
    expected = b"1" * BLOCK + b"2" * 10 + b"1" * (2 * BLOCK - 10)
    assert (other_place / "file").read_bytes() == expected


def test_an_open_file_sees_a_commit_made_elsewhere(place: Path, other_place: Path) -> None:
    (place / "file").write_bytes(b"old!")
    with (other_place / "file").open("rb", buffering=0) as file:
        assert file.read() == b"old!"
        (place / "file").write_bytes(b"new content")
        assert os.pread(file.fileno(), 100, 0) == b"new content"
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == b"new content"


def test_attributes_and_names_are_seen_at_once(place: Path, other_place: Path) -> None:
    path, other = place / "file", other_place / "file"
    assert not other.exists()
    path.touch()
    assert other.exists()
    assert other.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    assert other.stat().st_mode & 0o777 == 0o600
    os.utime(path, ns=(1, 2))
    assert other.stat().st_mtime_ns == 2
    path.rename(place / "renamed")
    assert not other.exists()
    assert (other_place / "renamed").exists()
    assert os.listdir(other_place) == ["renamed"]
    (place / "renamed").unlink()
    assert os.listdir(other_place) == []


def test_a_size_seen_by_stat_is_at_most_a_second_old(place: Path, other_place: Path) -> None:
    with (place / "file").open("wb", buffering=0) as file:
        for size in range(1, 6):
            file.write(b"x")
            os.fsync(file.fileno())
            deadline = time.monotonic() + 1
            while (other_place / "file").stat().st_size != size:
                assert time.monotonic() < deadline
            assert (other_place / "file").stat().st_size == size


def test_a_file_removed_elsewhere_lives_while_it_is_open_here(
    place: Path, other_place: Path
) -> None:
    data = b"kept " * 100_000
    (place / "file").write_bytes(data)
    with (other_place / "file").open("rb", buffering=0) as file:
        (place / "file").unlink()
        assert not (other_place / "file").exists()
        # What another file is given now must not be this one's.
        (place / "another").write_bytes(b"y" * len(data))
        assert file.read() == data
        assert os.fstat(file.fileno()).st_nlink == 0


def test_a_file_replaced_elsewhere_keeps_its_bytes_for_its_readers(
    place: Path, other_place: Path
) -> None:
    (place / "file").write_bytes(b"first")
    (place / "next").write_bytes(b"second")
    with (other_place / "file").open("rb", buffering=0) as file:
        (place / "next").rename(place / "file")
        assert file.read() == b"first"
        assert (other_place / "file").read_bytes() == b"second"


def test_a_truncation_elsewhere_shortens_the_cached_pages(place: Path, other_place: Path) -> None:
    (place / "file").write_bytes(b"x" * (2 * BLOCK))
    assert len((other_place / "file").read_bytes()) == 2 * BLOCK
    os.truncate(place / "file", 100)
    assert (other_place / "file").read_bytes() == b"x" * 100
    os.truncate(place / "file", 300)
    assert (other_place / "file").read_bytes() == b"x" * 100 + bytes(200)


def test_disjoint_writes_from_both_sides_are_both_kept(place: Path, other_place: Path) -> None:
    (place / "file").write_bytes(bytes(2000))
    with (
        (place / "file").open("r+b", buffering=0) as here,
        (other_place / "file").open("r+b", buffering=0) as there,
    ):
        os.pwrite(here.fileno(), b"a" * 1000, 0)
        os.pwrite(there.fileno(), b"b" * 1000, 1000)
    expected = b"a" * 1000 + b"b" * 1000
    assert (place / "file").read_bytes() == expected
    assert (other_place / "file").read_bytes() == expected


@pytest.mark.timeout(60)
def test_both_create_in_one_directory_without_waiting_for_leases(
    place: Path, other_place: Path
) -> None:
    """Each kernel locks the directory while it creates; that must not stop the invalidation which
    the other one's creation waits for."""
    count = 100
    errors: list[BaseException] = []

    def create(directory: Path, prefix: str) -> None:
        try:
            for number in range(count):
                (directory / f"{prefix}{number}").touch()
                os.listdir(directory)
        except BaseException as error:
            errors.append(error)

    os.listdir(place)
    os.listdir(other_place)
    threads = [
        threading.Thread(target=create, args=(directory, prefix))
        for directory, prefix in ((place, "a"), (other_place, "b"))
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(place)) == sorted(os.listdir(other_place))
    assert len(os.listdir(place)) == 2 * count
    assert time.monotonic() - started < 10  # a single wait for a lease takes up to 5 s
