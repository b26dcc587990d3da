"""Stored state that was changed behind the servers' backs: refused, never served as good."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crailfs.client.blocking import BlockingStore
from crailfs.config_file import Settings
from crailfs.errors import ChecksumError
from crailfs.records import StorageClass, Tier
from tests.faults.reader import read
from tests.support.process_cluster import ProcessCluster, process_cluster

DAMAGED = 6
"""``crail``'s exit code for stored state that fails its check."""
PAGE_BYTES = 4096
COPY_BYTES = 32 * 1024
"""From a region's first superblock to the second."""
FILES = 300


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ProcessCluster]:
    with process_cluster(tmp_path, mount=False) as cluster:
        yield cluster


def refused(cluster: ProcessCluster, server: str) -> str:
    """The server does not start: one line that says what to do, and the exit code of damage."""
    done = cluster.crail(server)
    assert done.returncode == DAMAGED, f"{done.returncode}: {done.stderr}"
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d{4}-", line)]
    assert len(lines) == 1 and lines[0].startswith(f"crail {server}: "), done.stderr
    assert "estore" in lines[0], "says what to do"
    return lines[0]


def flip(path: Path, offset: int) -> int:
    """Change one bit of the byte at ``offset``; what it is now."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 0x10
        file.seek(offset)
        file.write(bytes([byte]))
    return byte


def many_files(cluster: ProcessCluster) -> None:
    with BlockingStore(cluster.client_config()) as store:
        for number in range(FILES):
            store.write(f"/file-{number:03}", b"%d" % number)


@pytest.mark.fault
@pytest.mark.timeout(60)
def test_a_damaged_database(cluster: ProcessCluster) -> None:
    many_files(cluster)
    cluster.stop()
    database = cluster.state / "metadata" / "lmdb" / "data.mdb"
    good = database.read_bytes()
    changes: list[Callable[[], object]] = [
        lambda: database.write_bytes(good[: len(good) // 2]),
        lambda: database.write_bytes(b""),
        lambda: [flip(database, page + 16) for page in (0, PAGE_BYTES)],
        lambda: database.write_bytes(good[: 2 * PAGE_BYTES] + bytes(len(good) - 2 * PAGE_BYTES)),
        database.unlink,
    ]
    for change in changes:
        change()
        assert "data.mdb" in refused(cluster, "metadata")
        database.write_bytes(good)
    value = good.rfind(b"file-123")
    assert value > 0
    flip(database, value + 5)  # within a row: found when it is read
    cluster.start("metadata")
    cluster.start("storage")
    done = cluster.crail("fsck")
    assert done.returncode == DAMAGED and "estore" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + cluster.log("metadata")
    cluster.stop()
    database.write_bytes(good)
    (cluster.state / "metadata" / "journal").unlink()
    assert "journal is missing" in refused(cluster, "metadata")


@pytest.mark.fault
@pytest.mark.timeout(60)
def test_a_damaged_journal(cluster: ProcessCluster) -> None:
    many_files(cluster)
    cluster.kill("metadata")
    journal = cluster.state / "metadata" / "journal"
    good = journal.read_bytes()
    for offset in (0, 30, len(good) // 3, len(good) // 2):
        flip(journal, offset)
        assert "journal" in refused(cluster, "metadata")
        journal.write_bytes(good)
    # Only the last record may be torn, as by a crash: it was never acknowledged in full.
    journal.write_bytes(good + good[-100:-50])
    cluster.start("metadata")
    assert "cut off 50 bytes" in cluster.log("metadata")
    with BlockingStore(cluster.client_config()) as store:
        assert len(store.list("/")) == FILES


@pytest.mark.fault
@pytest.mark.timeout(60)
@pytest.mark.parametrize("tier", [Tier.MEMORY, Tier.DISK])
def test_damaged_superblocks(cluster: ProcessCluster, tier: Tier) -> None:
    path = region_path(cluster, tier)
    with BlockingStore(cluster.client_config()) as store:
        store.create("/file", storage_class=StorageClass(tier, tier)).close()
        store.write("/file", b"kept")
    cluster.kill("storage")
    flip(path, 20)
    cluster.start("storage")
    assert "repairing" in cluster.log("storage")
    with BlockingStore(cluster.client_config()) as store:
        assert store.read("/file") == b"kept"
    cluster.kill("storage")
    good = path.read_bytes()
    flip(path, 20)
    flip(path, COPY_BYTES + 20)
    assert str(path) in refused(cluster, "storage")
    path.write_bytes(good[:-PAGE_BYTES])
    assert "cut short" in refused(cluster, "storage")
    path.write_bytes(good)
    cluster.start("storage")
    with BlockingStore(cluster.client_config()) as store:
        assert store.read("/file") == b"kept"


def region_path(cluster: ProcessCluster, tier: Tier) -> Path:
    regions = Settings.load(cluster.configuration).storage().regions
    return next(region.path for region in regions if region.tier is tier)


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.timeout(60)
def test_damaged_blocks(tmp_path: Path) -> None:
    choose = random.Random(1)
    contents = {
        f"{tier.name}-{kind}": choose.randbytes(200_000)
        for tier in (Tier.MEMORY, Tier.DISK)
        for kind in ("bad", "good")
    }
    with process_cluster(tmp_path) as cluster:
        with BlockingStore(cluster.client_config()) as store:
            for name, content in contents.items():
                tier = Tier[name.partition("-")[0]]
                with store.create(f"/{name}", storage_class=StorageClass(tier, tier)) as file:
                    file.write(content)
        for tier in (Tier.MEMORY, Tier.DISK):
            path = region_path(cluster, tier)
            at = path.read_bytes().find(contents[f"{tier.name}-bad"][100_000:100_100])
            assert at > 0
            flip(path, at)
        for transport in ("local", "tcp"):
            cluster.mount_with(transport)
            with BlockingStore(cluster.client_config(transport)) as store:
                for name, content in contents.items():
                    if name.endswith("good"):
                        assert store.read(f"/{name}") == content
                        assert (cluster.mountpoint / name).read_bytes() == content
                        continue
                    with pytest.raises(ChecksumError, match="restore the file"):
                        store.read(f"/{name}")
                    for direct in (False, True):
                        with pytest.raises(OSError) as raised:
                            read(str(cluster.mountpoint / name), direct=direct)
                        assert raised.value.errno == errno.EIO
                    # The blocks that are good can still be read.
                    assert store.read(f"/{name}", 0, 65_536) == content[:65_536]
        cluster.audit()
        done = cluster.crail("fsck", "--data")
        assert done.returncode == DAMAGED
        found = [line for line in done.stdout.splitlines() if line.startswith("/")]
        assert [line.partition(":")[0] for line in found] == ["/DISK-bad", "/MEMORY-bad"]
        for tier in (Tier.MEMORY, Tier.DISK):
            os.unlink(cluster.mountpoint / f"{tier.name}-bad")
        cluster.audit(data=True)
