"""What each MiB over RDMA takes of the processors: counts, which are the same on any device.

Client and servers are on one host here; what the network cards do between two is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.bench import rdma
from crailfs.bench.rdma import Count, Counts
from crailfs.bench.servers import start_servers
from crailfs.bench.workbench import Workbench
from crailfs.config import ClientConfig, RegionConfig
from crailfs.records import StorageClass, Tier
from crailfs.units import MIB

pytestmark = pytest.mark.timeout(400)

WAKEUPS_BY_MIB_MAX = 0.5
"""Over what idle servers do. A server that were woken for each block would have 16."""


@pytest.fixture(scope="module")
def client(address: str, devdax: Path) -> Iterator[ClientConfig]:
    with Workbench("test") as bench:
        memory = RegionConfig(
            tier=Tier.MEMORY, path=bench.shared_memory / "memory", size_bytes=160 * MIB
        )
        pmem = RegionConfig(tier=Tier.PMEM, path=devdax, size_bytes=0, overwrite=True)
        yield start_servers(bench, (memory, pmem), listen=address).client()


@pytest.fixture(scope="module")
def in_pmem(client: ClientConfig, out: Path) -> Counts:
    return measured(client, "pmem", out)


@pytest.fixture(scope="module")
def in_memory(client: ClientConfig, out: Path) -> Counts:
    return measured(client, "memory", out)


def measured(client: ClientConfig, storage_class: str, out: Path) -> Counts:
    counts = rdma.measure(client, StorageClass.parse(storage_class))
    print(counts.table())
    (out / f"rdma-counts-{storage_class}.txt").write_text(counts.table() + "\n")
    (out / f"rdma-counts-{storage_class}.json").write_text(json.dumps(counts.as_json(), indent=1))
    return counts


def writes(counts: Counts) -> list[Count]:
    return [count for count in counts.counts if count.operation.startswith("write")]


def reads(counts: Counts) -> list[Count]:
    return [count for count in counts.counts if count.operation.startswith("read")]


def test_writing_to_persistent_memory_takes_one_write_and_one_flush_a_run(in_pmem: Counts) -> None:
    assert in_pmem.rung == "RDMA_FLUSH"
    assert in_pmem.media == ("pmem (devdax)",)
    for count in writes(in_pmem):
        assert count.verbs == {"writes": count.runs, "flushes": count.runs, "reads": 0}, count
        assert count.copied_bytes == count.byte_count, count


def test_writing_to_memory_takes_one_write_a_run(in_memory: Counts) -> None:
    for count in writes(in_memory):
        assert count.verbs == {"writes": count.runs, "flushes": 0, "reads": 0}, count
        assert count.copied_bytes == count.byte_count, count


@pytest.mark.parametrize("tier", ["pmem", "memory"])
def test_reading_takes_reads_alone(tier: str, request: pytest.FixtureRequest) -> None:
    for count in reads(request.getfixturevalue(f"in_{tier}")):
        assert count.verbs["writes"] == count.verbs["flushes"] == 0, count
        assert count.verbs["reads"] <= count.runs, count
        # What comes from two runs is laid together.
        most = 0 if count.runs == count.calls else count.byte_count
        assert count.copied_bytes <= most, count


@pytest.mark.parametrize("tier", ["pmem", "memory"])
def test_the_server_has_no_part_in_it(tier: str, request: pytest.FixtureRequest) -> None:
    counts = request.getfixturevalue(f"in_{tier}").counts
    for count in counts:
        assert count.server_requests == 0, count
        assert count.tcp_operations == 0, count
    # Over all of them: timers do not tick evenly in a guest, and a few seconds of each say little.
    more = sum(count.server_wakeups - count.server_idle_wakeups for count in counts)
    assert more <= WAKEUPS_BY_MIB_MAX * sum(count.byte_count for count in counts) / MIB, counts
