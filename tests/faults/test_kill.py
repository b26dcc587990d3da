"""``kill -9`` of each process, 100 times each, at instants that a seed chooses, under a load.

What is acknowledged (a ``close``, ``rename`` or ``unlink`` that returned) must hold afterwards, the
auditor must find nothing, programs whose client stayed up must not notice more than a pause, and
nothing may hang: each acknowledgement is waited for with a deadline. While servers are killed, one
load runs through the mount and another through the Python API, one over shared memory and one over
TCP alone, and what both have finished is read and checked all the time.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.running import Load, Reading
from tests.support.process_cluster import process_cluster
from tests.support.processes import wait_until

ROUNDS = int(os.environ.get("CRAIL_TEST_KILL_ROUNDS", "100"))
SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
CHECK_EVERY = 20


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("victim", "mounted_over", "api_over"),
    [("metadata", "local", "tcp"), ("storage", "tcp", "local"), ("storage", "local", "tcp")],
)
def test_server_killed_under_load(
    victim: str, mounted_over: str, api_over: str, tmp_path: Path
) -> None:
    rounds = ROUNDS if victim == "metadata" else ROUNDS // 2
    print(f"seed {SEED}, {rounds} rounds")
    choose = random.Random(f"{SEED}/{victim}/{mounted_over}")
    with process_cluster(tmp_path, transports=(mounted_over,)) as cluster, ExitStack() as ending:
        loads = [Load(cluster, name, SEED) for name in ("mount", "api")]
        for load, api_transport in zip(loads, ("", api_over), strict=True):
            load.directory.mkdir()
            load.start(api_transport=api_transport)
            ending.callback(load.end)
        reading = Reading([load.directory for load in loads], SEED)
        ending.callback(reading.kill)
        for number in range(1, rounds + 1):
            choose.choice(loads).acknowledged(choose.randrange(1, 40))
            _pause(choose)
            cluster.restart(victim)
            if number % CHECK_EVERY == 0:
                cluster.audit()
        for load in loads:
            load.acknowledged(5)
            load.end()
            assert not load.errors, load.errors
            load.check()
        files_read = reading.end()
        assert files_read > rounds
        print(f"{files_read} files read meanwhile, {[load.step_count for load in loads]} steps")


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mount_killed_under_load(tmp_path: Path) -> None:
    print(f"seed {SEED}, {ROUNDS} rounds")
    choose = random.Random(f"{SEED}/mount")
    with process_cluster(tmp_path) as cluster:
        load = Load(cluster, "load", SEED)
        load.directory.mkdir()
        for number in range(1, ROUNDS + 1):
            load.start()
            load.acknowledged(choose.randrange(1, 40))
            _pause(choose)
            cluster.kill("mount")
            load.end()
            cluster.mount_with(choose.choice(("local", "tcp")))
            if number % CHECK_EVERY == 0 or number == ROUNDS:
                load.check()
                cluster.audit()
                load.remove_all()
                load.directory.mkdir()
        cluster.running.pop("mount").stop()
        wait_until(lambda: cluster.used_bytes() == 0, "the dead clients' sessions ended", 60)
        wait_until(lambda: cluster.reclaim_blocks() == 0, "the dead clients are fenced")


def _pause(choose: random.Random) -> None:
    """Burn up to 3 ms, so that the kill falls anywhere within a step."""
    until = time.perf_counter() + choose.random() * 0.003
    while time.perf_counter() < until:
        pass
