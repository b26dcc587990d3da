"""Tiers as a program on the mount sees them: classes, falling through, full, no old bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.units import MIB
from tests.support.embedded import Embedded, embedded

pytestmark = [pytest.mark.mount, pytest.mark.timeout(90)]

TIER_BYTES = 64 * MIB
"""Of each of the two tiers of ``embedded``."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("tiers")) as running:
        done = running.up()
        assert done.returncode == 0, done.stderr
        yield running


@pytest.fixture
def place(system: Embedded) -> Iterator[Path]:
    """An empty file system, audited at the end."""
    directory = system.mountpoint / "place"
    directory.mkdir()
    yield directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    done = system.crail("fsck", "--at", str(system.mountpoint))
    assert done.returncode == 0, done.stdout + done.stderr


def used_bytes(system: Embedded) -> dict[str, int]:
    return {tier["tier"]: tier["used_bytes"] for tier in system.status()["tiers"]}


def free_bytes(place: Path) -> int:
    figures = os.statvfs(place)
    return figures.f_bfree * figures.f_frsize


def test_a_directory_of_a_class_keeps_its_files_in_that_tier(system: Embedded, place: Path) -> None:
    before = used_bytes(system)
    os.setxattr(place, "user.crail.storage_class", b"disk")
    (place / "file").write_bytes(b"d" * (8 * MIB))
    assert os.getxattr(place / "file", "user.crail.storage_class") == b"disk"
    after = used_bytes(system)
    assert after["disk"] - before["disk"] >= 8 * MIB
    assert after["memory"] - before["memory"] < MIB


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage_class", b"tape"),
        ("storage_class", b"disk>memory"),
        ("block_size", b"100"),
        ("replicas", b"2"),
        ("durability", b"never"),
    ],
)
def test_a_class_that_cannot_be_is_refused(place: Path, name: str, value: bytes) -> None:
    with pytest.raises(OSError) as refused:
        os.setxattr(place, f"user.crail.{name}", value)
    assert refused.value.errno == errno.EINVAL


def test_a_file_falls_through_to_the_next_tier_in_its_middle(system: Embedded, place: Path) -> None:
    content = os.urandom(MIB)
    with (place / "large").open("wb") as file:
        for _ in range(96):
            file.write(content)
    used = used_bytes(system)
    assert used["memory"] > TIER_BYTES // 2
    assert used["disk"] > TIER_BYTES // 4
    with (place / "large").open("rb") as file:
        for number in range(96):
            assert file.read(MIB) == content, f"MiB {number}"


def test_full_is_an_error_and_the_file_system_is_usable_after_it(place: Path) -> None:
    chunk = b"f" * MIB
    empty_bytes = free_bytes(place)
    descriptor = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError) as full:
        for _ in range(2 * TIER_BYTES // MIB + 1):
            os.write(descriptor, chunk)
    assert full.value.errno == errno.ENOSPC
    os.close(descriptor)
    # Names need no blocks, and what is there can be read.
    (place / "empty").touch()
    with (place / "filler").open("rb") as file:
        assert file.read(MIB) == chunk
    (place / "filler").unlink()
    assert free_bytes(place) > empty_bytes - 4 * MIB, "deleting frees at once"
    (place / "next").write_bytes(chunk)
    assert (place / "next").read_bytes() == chunk


def test_a_class_of_one_tier_is_full_when_that_tier_is(place: Path) -> None:
    os.setxattr(place, "user.crail.storage_class", b"memory")
    with pytest.raises(OSError) as full, (place / "filler").open("wb", buffering=0) as file:
        for _ in range(TIER_BYTES // MIB + 1):
            file.write(b"m" * MIB)
    assert full.value.errno == errno.ENOSPC


def test_a_new_file_never_shows_an_old_ones_bytes(place: Path) -> None:
    """Every block of both tiers holds the secret before it is handed out again."""
    with pytest.raises(OSError), (place / "secrets").open("wb", buffering=0) as file:
        while True:
            file.write(b"secret! " * (MIB // 8))
    (place / "secrets").unlink()
    for number in range(64):
        with (place / f"new-{number}").open("wb", buffering=0) as file:
            os.pwrite(file.fileno(), b"x", 1_000 + 70_000 * (number % 5))
            os.ftruncate(file.fileno(), 500_000)
    for number in range(64):
        content = (place / f"new-{number}").read_bytes()
        assert content.count(b"\0") == 499_999
        assert content.count(b"x") == 1
