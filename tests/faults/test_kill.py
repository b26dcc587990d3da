"""``kill -9`` of each process, 100 times each, at instants that a seed chooses, under a load.

What is acknowledged (a ``close``, ``rename`` or ``unlink`` that returned) must hold afterwards, the
auditor must find nothing, programs on a mount that stayed up must not notice more than a pause,
and nothing may hang: each acknowledgement is waited for with a deadline.
"""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crailfs.limits import OPERATION_TIMEOUT_MS
from tests.faults.load import content
from tests.support.mounts import REPOSITORY
from tests.support.process_cluster import ProcessCluster, process_cluster

ROUNDS = int(os.environ.get("CRAIL_TEST_KILL_ROUNDS", "100"))
SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261120"))
CHECK_EVERY = 20
ACKNOWLEDGEMENT_TIMEOUT_S = OPERATION_TIMEOUT_MS / 1000 + 5


class Load:
    """The load process and what it has been promised so far."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.seed = seed
        self.temporary: set[int] = set()
        self.final: set[int] = set()
        self.gone: set[int] = set()
        self.uncertain: set[int] = set()
        """Files whose step was cut off by the mount's end: old or new state, both are right."""
        self.errors: list[str] = []
        self.next_index = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def start(self) -> None:
        self._buffer = b""
        self.process = subprocess.Popen(
            (
                *(sys.executable, "-m", "tests.faults.load"),
                *(str(self.directory), str(self.seed), str(self.next_index)),
            ),
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )

    def acknowledged(self, count: int) -> None:
        """Wait for ``count`` more acknowledged steps."""
        for _ in range(count):
            self._note(self._line())

    def end(self) -> None:
        """Kill the load; whatever it was doing is uncertain."""
        assert self.process is not None and self.process.stdout is not None
        self.process.kill()
        rest = self._buffer + self.process.stdout.read()
        self.process.wait(20)
        for line in rest.splitlines(keepends=True):
            if line.endswith(b"\n"):
                self._note(line)
        self.process.stdout.close()
        self.process = None
        self.uncertain |= {self.next_index, *range(self.next_index - 70, self.next_index - 50)}
        self.next_index += 1

    def _line(self) -> bytes:
        assert self.process is not None and self.process.stdout is not None
        deadline = time.monotonic() + ACKNOWLEDGEMENT_TIMEOUT_S
        while b"\n" not in self._buffer:
            waiting = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self.process.stdout], [], [], waiting)
            piece = os.read(self.process.stdout.fileno(), 65536) if readable else b""
            assert piece, (
                f"no acknowledgement within {ACKNOWLEDGEMENT_TIMEOUT_S} s, or the load ended"
            )
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _note(self, line: bytes) -> None:
        sign, number, *rest = line.decode().split()
        index = int(number)
        self.next_index = max(self.next_index, index + 1 if sign != "-" else 0)
        if sign == "+":
            self.temporary.add(index)
        elif sign == ">":
            self.temporary.discard(index)
            self.final.add(index)
        elif sign == "-":
            self.final.discard(index)
            self.gone.add(index)
        else:
            self.errors.append(f"file {index}: errno {rest[0]}")
            self.uncertain.add(index)

    def check(self) -> None:
        """Everything promised is there with its bytes, and what was removed stays removed."""
        present = set(os.listdir(self.directory))
        for index in self.final - self.uncertain:
            assert str(index) in present, f"file {index} was acknowledged and is missing"
            data = (self.directory / str(index)).read_bytes()
            assert data == content(self.seed, index), f"file {index} has other bytes"
        for index in self.temporary - self.uncertain:
            names = {f"{index}.part", str(index)} & present
            assert names, f"file {index} was closed and is missing"
            data = (self.directory / names.pop()).read_bytes()
            assert data == content(self.seed, index), f"file {index} has other bytes"
        assert not {str(index) for index in self.gone} & present, "a removed file came back"


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["metadata", "storage"])
def test_server_killed_under_load(victim: str, tmp_path: Path) -> None:
    print(f"seed {SEED}, {ROUNDS} rounds")
    choose = random.Random(f"{SEED}/{victim}")
    with process_cluster(tmp_path) as cluster:
        directory = cluster.mountpoint / "load"
        directory.mkdir()
        load = Load(directory, SEED)
        load.start()
        for number in range(1, ROUNDS + 1):
            load.acknowledged(choose.randrange(1, 40))
            _pause(choose)
            cluster.restart(victim)
            if number % CHECK_EVERY == 0 or number == ROUNDS:
                load.acknowledged(5)
                load.end()
                assert not load.errors, load.errors
                load.check()
                cluster.audit()
                load.start()
        load.end()


@pytest.mark.fault
@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mount_killed_under_load(tmp_path: Path) -> None:
    print(f"seed {SEED}, {ROUNDS} rounds")
    choose = random.Random(f"{SEED}/mount")
    with process_cluster(tmp_path) as cluster:
        directory = cluster.mountpoint / "load"
        directory.mkdir()
        load = Load(directory, SEED)
        for number in range(1, ROUNDS + 1):
            load.start()
            load.acknowledged(choose.randrange(1, 40))
            _pause(choose)
            cluster.kill("mount")
            load.end()
            cluster.start("mount")
            if number % CHECK_EVERY == 0 or number == ROUNDS:
                load.check()
                cluster.audit()
        _no_blocks_leaked(cluster)


def _pause(choose: random.Random) -> None:
    """Burn up to 3 ms, so that the kill falls anywhere within a step."""
    until = time.perf_counter() + choose.random() * 0.003
    while time.perf_counter() < until:
        pass


def _no_blocks_leaked(cluster: ProcessCluster) -> None:
    """When everything is removed and the dead clients' sessions have ended, all space is free."""
    for name in os.listdir(cluster.mountpoint / "load"):
        os.unlink(cluster.mountpoint / "load" / name)
    cluster.running.pop("mount").stop()
    deadline = time.monotonic() + 60
    while (used := _used_blocks(cluster)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert used == 0, f"{used} blocks are still taken by clients that are gone"


def _used_blocks(cluster: ProcessCluster) -> int:
    from tests.support.processes import run_crail

    done = run_crail("status", "--json", "--config", str(cluster.configuration))
    assert done.returncode == 0, done.stderr
    import json

    tiers = json.loads(done.stdout)["tiers"]
    return sum(tier["used_bytes"] for tier in tiers)
