"""Clients that are killed or stopped in mid-write: nothing leaks, nothing of others is touched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.client.blocking import BlockingStore
from crailfs.limits import (
    BLOCK_SIZE_DEFAULT_BYTES,
    SESSION_TIMEOUT_MS,
    STORAGE_HEARTBEAT_INTERVAL_MS,
)
from tests.faults.vanishing import AGAIN, COMMITTED, UNCOMMITTED
from tests.support.mounts import REPOSITORY
from tests.support.process_cluster import ProcessCluster, process_cluster
from tests.support.processes import wait_until

THEIRS = b"theirs" * 500_000
EXPIRY_TIMEOUT_S = SESSION_TIMEOUT_MS / 1000 + 10


class Vanishing:
    """See ``tests.faults.vanishing``."""

    def __init__(self, cluster: ProcessCluster, transport: str, path: str) -> None:
        self.process = subprocess.Popen(
            (
                *(sys.executable, "-m", "tests.faults.vanishing"),
                *(str(cluster.configuration), transport, path),
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def proceed(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextlib.contextmanager
def vanishing(cluster: ProcessCluster, transport: str, path: str) -> Iterator[Vanishing]:
    """Has written what it will not commit when the block begins."""
    client = Vanishing(cluster, transport, path)
    with client.process:
        try:
            assert client.next_line() == "written"
            yield client
        finally:
            client.process.kill()


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_clients_that_vanish_in_mid_write(transport: str, tmp_path: Path) -> None:
    held_blocks = len(UNCOMMITTED) // BLOCK_SIZE_DEFAULT_BYTES
    with (
        process_cluster(tmp_path, mount=False) as cluster,
        vanishing(cluster, transport, "/killed") as killed,
        vanishing(cluster, transport, "/stopped") as stopped,
        BlockingStore(cluster.client_config()) as store,
    ):
        assert cluster.used_bytes() >= 2 * len(UNCOMMITTED)
        killed.signal(signal.SIGKILL)
        stopped.signal(signal.SIGSTOP)
        store.write("/others", THEIRS)
        wait_until(
            lambda: cluster.used_bytes() < len(UNCOMMITTED), "sessions ended", EXPIRY_TIMEOUT_S
        )
        if transport == "local":
            # It can write through its mapping as soon as it goes on: nobody may have these blocks.
            wait_until(lambda: "refusing" in cluster.log("storage"), "the fence was asked for")
            time.sleep(3 * STORAGE_HEARTBEAT_INTERVAL_MS / 1000)  # time in which it could go wrong
            assert cluster.reclaim_blocks() >= held_blocks
        else:
            wait_until(lambda: cluster.reclaim_blocks() == 0, "both are fenced")
        store.write("/more", THEIRS)
        stopped.proceed()
        stopped.signal(signal.SIGCONT)
        assert stopped.next_line().startswith("FencedError: ")
        assert stopped.next_line() == "written again"
        assert stopped.process.wait(20) == 0
        assert store.read("/stopped") == AGAIN
        assert store.read("/killed") == COMMITTED
        assert store.read("/others") == store.read("/more") == THEIRS
        cluster.audit(data=True)
        for entry in store.list("/"):
            store.delete(f"/{entry.name}")
        wait_until(lambda: cluster.reclaim_blocks() == 0, "all are fenced", EXPIRY_TIMEOUT_S)
        store.close()
        wait_until(lambda: cluster.used_bytes() == 0, "all space is free", EXPIRY_TIMEOUT_S)
