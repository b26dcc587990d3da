"""Large directories, read while they change."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from crailfs.client.filesystem import FileSystem
from crailfs.config import ClientConfig
from crailfs.config_file import Settings
from crailfs.records import NodeKind
from tests.mount.conftest import mount_cluster
from tests.support.process_cluster import ProcessCluster

ENTRY_COUNT = 100_000
IN_FLIGHT = 64


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    """Of its own: the audit of so many nodes would slow every later test down."""
    with mount_cluster() as running:
        yield running


def create_files(config: ClientConfig, directory_ino: int, names: list[bytes]) -> None:
    """Through the store, many at once."""

    async def run() -> None:
        remaining = iter(names)
        async with FileSystem.connect(config) as file_system, trio.open_nursery() as nursery:

            async def create() -> None:
                for name in remaining:
                    await file_system.create_node(
                        directory_ino, name, NodeKind.FILE, mode=0o644, uid=0, gid=0
                    )

            for _ in range(IN_FLIGHT):
                nursery.start_soon(create)

    trio.run(run)


@pytest.mark.timeout(120)
def test_a_directory_of_100_000_entries_is_read_while_it_changes(
    cluster: ProcessCluster, place: Path
) -> None:
    stable = [b"entry-%06d" % number for number in range(ENTRY_COUNT)]
    config = Settings.load(cluster.configuration).client()
    create_files(config, place.stat().st_ino, stable)
    assert place.stat().st_size == ENTRY_COUNT
    seen: Counter[str] = Counter()
    with os.scandir(place) as entries:
        for count, entry in enumerate(entries):
            seen[entry.name] += 1
            if count % 1000 == 0:
                # Before, among and behind what was read already; removed again a little later.
                for name in (f"a{count}", f"entry-{count:06d}x", f"z{count}"):
                    (place / name).touch()
                if count >= 2000:
                    (place / f"z{count - 2000}").unlink()
                    (place / f"a{count - 2000}").unlink()
    missing = [name for name in map(os.fsdecode, stable) if name not in seen]
    twice = [name for name, count in seen.items() if count > 1]
    assert (missing, twice) == ([], [])


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_dots_are_listed_with_their_inodes(place: Path) -> None:
    directory = place / "directory"
    directory.mkdir()
    # os.listdir leaves them out: by the C library's own tool.
    with os.popen(f"ls -ai {directory}") as listing:
        found = dict(reversed(line.split()) for line in listing)
    assert found == {".": str(directory.stat().st_ino), "..": str(place.stat().st_ino)}


def test_rewinding_shows_what_is_new(place: Path) -> None:
    (place / "first").touch()
    with opened(place) as fd:
        assert os.listdir(fd) == ["first"]
        (place / "second").touch()
        (place / "first").unlink()
        assert os.listdir(fd) == ["second"]  # listdir of a descriptor rewinds


def test_removing_while_reading_removes_everything(place: Path) -> None:
    for number in range(3000):
        (place / f"file-{number}").touch()
    with os.scandir(place) as entries:
        for entry in entries:
            os.unlink(entry)
    assert os.listdir(place) == []


def test_listed_attributes_are_those_of_the_files(place: Path) -> None:
    for number in range(50):
        (place / f"file-{number}").write_bytes(b"x" * number)
        (place / f"directory-{number}").mkdir()
    with os.scandir(place) as entries:
        for entry in entries:
            kind, _, number = entry.name.partition("-")
            assert entry.is_dir() == (kind == "directory")
            assert entry.inode() == entry.stat().st_ino
            if kind == "file":
                assert entry.stat().st_size == int(number)
