"""How what a mount writes to the other host becomes durable, and that this is shown."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.units import MIB
from tests.lab.rdma.load import content
from tests.lab.rdma.two_hosts import TwoHosts
from tests.support.processes import run_crail, wait_until

_WRITTEN = (8 * MIB, 100_000, 1)


@pytest.fixture
def without_rdma_flush(cluster: TwoHosts) -> Iterator[None]:
    cluster.stop("storage")
    cluster.start("storage", "storage.rdma_flush=false")
    yield
    cluster.stop("storage")
    cluster.start("storage")


def counted(cluster: TwoHosts, mount: Path) -> Counter[str]:
    """What the storage server did for files that were written and synced at ``mount``."""
    before = Counter(cluster.storage_status().counters)
    for index, byte_count in enumerate(_WRITTEN):
        path = mount / f"rung{index}"
        with path.open("wb", buffering=0) as file:
            file.write(content(index, byte_count))
            os.fsync(file.fileno())
        assert path.read_bytes() == content(index, byte_count)
    return Counter(cluster.storage_status().counters) - before


def shown(cluster: TwoHosts) -> dict[str, str]:
    """By ``crail status``: of each transport, how its clients' writes become durable."""
    done = run_crail("status", "--config", str(cluster.configuration), timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"region \d+: pmem, .*devdax.*, durable", done.stdout), done.stdout
    print(done.stdout, (cluster.directory / "rdma.log").read_text()[-2000:], sep="\n")
    return dict(re.findall(r"client \w+ \(.*\): (\w+), (.*)", done.stdout))


@pytest.mark.timeout(150)
def test_rdma_flush_or_the_server_over_tcp(
    cluster: TwoHosts, rdma_mount: Path, tcp_mount: Path
) -> None:
    assert not counted(cluster, rdma_mount).keys() & {"writes", "flushes", "range_flushes"}
    by_tcp = counted(cluster, tcp_mount)
    assert by_tcp["writes"] >= len(_WRITTEN)
    assert not by_tcp["range_flushes"]
    assert shown(cluster) == {"rdma": "durable by RDMA FLUSH", "tcp": "durable by the server"}


@pytest.mark.timeout(150)
def test_without_rdma_flush_a_read_and_a_request(
    cluster: TwoHosts, rdma_mount: Path, without_rdma_flush: None
) -> None:
    (rdma_mount / "first").write_bytes(b"connects")
    wait_until(
        lambda: any(client.transport == "rdma" for client in cluster.storage_status().clients),
        "RDMA is used again",
        timeout_s=30,
    )
    by_request = counted(cluster, rdma_mount)
    assert by_request["range_flushes"] >= len(_WRITTEN)
    assert not by_request["writes"]
    assert shown(cluster)["rdma"] == "durable by RDMA READ and a request"
