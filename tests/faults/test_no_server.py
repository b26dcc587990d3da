"""A server that is gone and stays away: errors within the deadline, and no mount that hangs."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from crailfs.client.blocking import BlockingStore
from crailfs.errors import UnavailableError
from crailfs.limits import LEASE_MS
from fuse_client.mountpoints import find_mount
from tests.faults.reader import read
from tests.support.mounts import in_child
from tests.support.process_cluster import ProcessCluster, process_cluster

T = TypeVar("T")

TIMEOUT_MS = 2_000
UNREACHABLE = 3
"""``crail``'s exit code when no server answers."""
SYSTEM_CALL_REQUESTS_MAX = 3
"""The kernel asks for a directory's attributes, an entry and the file one after the other, each
with a deadline of its own."""
MARGIN_S = 1.0
"""Of a busy machine."""
DATA = os.urandom(300_000)


def within_deadline(function: Callable[[], T]) -> T:
    """What the function returns or raises, which must not take longer than the deadline."""
    began_s = time.monotonic()
    try:
        return in_child(function)
    finally:
        elapsed_s = time.monotonic() - began_s
        limit_s = SYSTEM_CALL_REQUESTS_MAX * TIMEOUT_MS / 1000 + MARGIN_S
        assert elapsed_s < limit_s, f"took {elapsed_s:.1f} s"


def assert_unavailable(function: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        within_deadline(function)
    assert raised.value.errno == errno.EIO


def assert_umount_works(cluster: ProcessCluster) -> None:
    began_s = time.monotonic()
    done = cluster.umount()
    assert done.returncode == 0, done.stderr
    assert find_mount(cluster.mountpoint) is None
    cluster.running.pop("mount").process.wait(20)
    assert time.monotonic() - began_s < 20


def write_new(path: Path) -> None:
    with path.open("xb") as file:
        file.write(DATA)


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.timeout(120)
def test_without_a_metadata_server(tmp_path: Path) -> None:
    with process_cluster(tmp_path, operation_timeout_ms=TIMEOUT_MS) as cluster:
        base = cluster.mountpoint
        (base / "file").write_bytes(DATA)
        with (base / "open").open("wb", buffering=0) as file:
            file.write(DATA)
            cluster.kill("metadata")
            # Already open: bytes and space are here, only the commit has to wait.
            began_s = time.monotonic()
            with pytest.raises(OSError) as raised:
                os.fsync(file.fileno())
            assert raised.value.errno == errno.EIO
            assert time.monotonic() - began_s < TIMEOUT_MS / 1000 + MARGIN_S
            assert_unavailable((base / "file").unlink)
            assert_unavailable(lambda: os.listdir(base))
            time.sleep(LEASE_MS / 1000)  # what is cached may be shown no longer than its lease
            assert_unavailable((base / "file").stat)
            cluster.start("metadata")
            assert within_deadline((base / "file").read_bytes) == DATA
            os.fsync(file.fileno())  # what could not be committed was kept
        assert (base / "open").read_bytes() == DATA
        write_new(base / "after")
        cluster.kill("metadata")
        assert_umount_works(cluster)
        cluster.start("metadata")
        cluster.start("mount")
        assert (base / "open").read_bytes() == (base / "after").read_bytes() == DATA


@pytest.mark.fault
@pytest.mark.timeout(60)
def test_the_api_without_a_metadata_server(tmp_path: Path) -> None:
    with (
        process_cluster(tmp_path, operation_timeout_ms=TIMEOUT_MS, mount=False) as cluster,
        BlockingStore(cluster.client_config()) as store,
    ):
        store.write("/file", DATA)
        file = store.create("/open")
        file.write(DATA)
        cluster.kill("metadata")
        operations: list[Callable[[], object]] = [
            file.flush,
            lambda: store.mkdir("/directory"),
            lambda: store.list("/"),
            lambda: store.rename("/file", "/renamed"),
            store.statistics,
        ]
        for operation in operations:
            began_s = time.monotonic()
            with pytest.raises(UnavailableError, match="check that the server runs"):
                operation()
            assert time.monotonic() - began_s < TIMEOUT_MS / 1000 + MARGIN_S
        with pytest.raises(UnavailableError):
            BlockingStore(cluster.client_config()).open()
        done = cluster.crail("fsck")
        assert done.returncode == UNREACHABLE and "check that the server runs" in done.stderr
        cluster.start("metadata")
        file.close()
        assert store.read("/open") == store.read("/file") == DATA


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.timeout(120)
def test_without_a_storage_server_over_tcp(tmp_path: Path) -> None:
    with process_cluster(tmp_path, operation_timeout_ms=TIMEOUT_MS, transports=("tcp",)) as cluster:
        base = cluster.mountpoint
        (base / "file").write_bytes(DATA)
        cluster.kill("storage")
        path = str(base / "file")
        for _ in range(2):
            assert_unavailable(lambda: read(path, direct=True))
        assert_unavailable(lambda: write_new(base / "new"))
        within_deadline(lambda: (base / "file").rename(base / "renamed"))
        within_deadline((base / "directory").mkdir)
        assert within_deadline((base / "renamed").stat).st_size == len(DATA)
        with BlockingStore(cluster.client_config("tcp")) as store:
            began_s = time.monotonic()
            with pytest.raises(UnavailableError, match="storage server"):
                store.read("/renamed")
            assert time.monotonic() - began_s < TIMEOUT_MS / 1000 + MARGIN_S
        cluster.start("storage")
        assert within_deadline(lambda: read(str(base / "renamed"), direct=True)) == DATA
        write_new(base / "after")
        cluster.kill("storage")
        assert_umount_works(cluster)
        cluster.start("storage")
        cluster.start("mount")
        assert (base / "after").read_bytes() == DATA
