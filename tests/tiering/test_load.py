"""The mover at work below programs that write, read and remove: nothing they see changes.

The load's files are more than the memory tier holds, so that it is above its high water mark again
and again. Every byte that is read is compared, while the mover works and at the end.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from crailfs.units import MIB
from tests.faults.running import Load, Reading
from tests.support.process_cluster import ProcessCluster, process_cluster
from tests.support.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(300)]

SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261121"))
MEMORY_BYTES = 12 * MIB
DISK_BYTES = 1024 * MIB
"""Clients hold so many granted blocks in store that a smaller one would be full."""
HIGH_WATER = 0.9
KILL_ROUNDS = int(os.environ.get("CRAIL_TEST_MOVER_KILLS", "25"))
MOVED_BYTES_MIN = 12 * MIB
SETTLED_FILES = 8
"""Of 1 MiB, written before the load, whose own files live about a second."""


@contextmanager
def loaded(cluster: ProcessCluster, api_transport: str) -> Iterator[tuple[list[Load], Reading]]:
    """One load through the mount, one through the API, and a reader of both."""
    with ExitStack() as ending:
        settled = cluster.mountpoint / "settled"
        settled.mkdir()
        for number in range(SETTLED_FILES):
            (settled / str(number)).write_bytes(settled_bytes(number))
        loads = [Load(cluster, name, SEED) for name in ("mount", "api")]
        for load, transport in zip(loads, ("", api_transport), strict=True):
            load.directory.mkdir()
            load.start(api_transport=transport)
            ending.callback(load.end)
        reading = Reading([load.directory for load in loads], SEED)
        ending.callback(reading.kill)
        yield loads, reading


def settled_bytes(number: int) -> bytes:
    return random.Random(f"{SEED}/settled/{number}").randbytes(MIB)


def check_settled(cluster: ProcessCluster) -> None:
    for number in range(SETTLED_FILES):
        data = (cluster.mountpoint / "settled" / str(number)).read_bytes()
        assert data == settled_bytes(number), f"settled file {number} has other bytes"


def counters(cluster: ProcessCluster) -> Counter[str]:
    """The storage server's own."""
    done = cluster.crail("status", "--json")
    assert done.returncode == 0, done.stderr
    (server,) = json.loads(done.stdout)["servers"]
    return Counter(server["counters"])


def memory_share(cluster: ProcessCluster) -> float:
    done = cluster.crail("status", "--json")
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["tiers"][0]
    assert memory["tier"] == "memory"
    return float(memory["used_bytes"] / memory["total_bytes"])


def end_and_check(loads: list[Load], reading: Reading) -> None:
    for load in loads:
        load.end()
        assert not load.errors, load.errors
        load.check()
    files_read = reading.end()
    print(f"{files_read} files read meanwhile, {[load.step_count for load in loads]} steps")
    assert files_read > 0


@pytest.mark.parametrize(("mounted_over", "api_over"), [("local", "tcp"), ("tcp", "local")])
def test_a_full_fast_tier_under_load(mounted_over: str, api_over: str, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    cluster_of_two = process_cluster(
        tmp_path, transports=(mounted_over,), memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES
    )
    with cluster_of_two as cluster:
        with loaded(cluster, api_over) as (loads, reading):
            while counters(cluster)["demoted_bytes"] < MOVED_BYTES_MIN:
                for load in loads:
                    load.acknowledged(50)
                check_settled(cluster)
            end_and_check(loads, reading)
        wait_until(
            lambda: memory_share(cluster) <= HIGH_WATER, "memory is below its high water mark", 60
        )
        moved = counters(cluster)
        print({name: moved[name] for name in moved if "mote" in name or "move" in name})
        for load in loads:
            load.check()
        check_settled(cluster)
        cluster.audit(data=True)


@pytest.mark.fault
def test_the_storage_server_is_killed_while_it_moves(tmp_path: Path) -> None:
    print(f"seed {SEED}, {KILL_ROUNDS} rounds")
    choose = random.Random(f"{SEED}/mover")
    moved: Counter[str] = Counter()
    with process_cluster(tmp_path, memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES) as cluster:
        with loaded(cluster, "tcp") as (loads, reading):
            for _ in range(KILL_ROUNDS):
                choose.choice(loads).acknowledged(choose.randrange(20, 200))
                moved += counters(cluster)
                cluster.restart("storage")
            end_and_check(loads, reading)
        print({name: moved[name] for name in moved if "mote" in name or "move" in name})
        assert moved["demoted_bytes"] > 0
        wait_until(lambda: cluster.reclaim_blocks() == 0, "the dead movers' blocks are free", 60)
        for load in loads:
            load.check()
        check_settled(cluster)
        cluster.audit(data=True)


@pytest.mark.fault
def test_the_metadata_server_is_killed_while_blocks_move(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    choose = random.Random(f"{SEED}/metadata")
    with process_cluster(tmp_path, memory_bytes=MEMORY_BYTES, disk_bytes=DISK_BYTES) as cluster:
        with loaded(cluster, "tcp") as (loads, reading):
            for _ in range(KILL_ROUNDS // 2):
                choose.choice(loads).acknowledged(choose.randrange(20, 200))
                cluster.restart("metadata")
            end_and_check(loads, reading)
        moved = counters(cluster)
        assert moved["demoted_bytes"] > 0
        for load in loads:
            load.check()
        check_settled(cluster)
        cluster.audit(data=True)
