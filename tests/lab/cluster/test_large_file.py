"""A large file written by RDMA, and every block of it checked where it lies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES
from crailfs.units import MIB
from crailfs.wire.messages import FlushRung
from tests.lab.rdma.load import content
from tests.lab.rdma.two_hosts import STATE, TwoHosts

LARGE_BYTES = 256 * MIB
PIECE_BYTES = 8 * MIB
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def pieces() -> Iterator[bytes]:
    return (content(at, PIECE_BYTES) for at in range(0, LARGE_BYTES, PIECE_BYTES))


def check(path: Path) -> None:
    DROP_CACHES.write_text("3")
    with path.open("rb", buffering=0) as file:
        for piece in pieces():
            assert file.read(PIECE_BYTES) == piece
        assert file.read(1) == b""


@pytest.mark.timeout(400)
def test_256_mb_written_by_rdma_are_good_on_the_other_hosts_persistent_memory(
    cluster: TwoHosts, rdma_mount: Path, tcp_mount: Path, devdax: Path
) -> None:
    path = rdma_mount / "large"
    before = cluster.storage_status().counters
    with path.open("wb", buffering=0) as file:
        for piece in pieces():
            file.write(piece)
        os.fsync(file.fileno())
    check(path)
    status = cluster.storage_status()
    assert {client.rung for client in status.clients if client.transport == "rdma"} == {
        FlushRung.RDMA_FLUSH
    }
    for counter in ("writes", "reads", "flushes", "range_flushes"):
        assert status.counters.get(counter, 0) == before.get(counter, 0), "the server took part"
    check(tcp_mount / "large")
    assert cluster.storage_status().counters["reads"] > before.get("reads", 0)

    cluster.stop("storage")
    command = ["python3", "-m", "tests.lab.cluster.there", "check", str(devdax), f"{STATE}/storage"]
    blocks = json.loads(cluster.peer.run(command, timeout_s=120))
    cluster.start("storage")
    assert blocks[str(path.stat().st_ino)] == LARGE_BYTES // BLOCK_SIZE_DEFAULT_BYTES
    path.unlink()
    cluster.audit()
