"""A client that is stopped while it writes by RDMA, and goes on when its blocks are another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from crailfs.client.store import CrailStore
from crailfs.units import MIB
from tests.lab.cluster.straggler import FILLING, LATER, LOST
from tests.lab.rdma.load import content
from tests.lab.rdma.two_hosts import TwoHosts
from tests.support.processes import wait_until

FILE_BYTES = 4 * MIB
FILES_MAX = 32


def blocks_of(cluster: TwoHosts, path: str) -> set[int]:
    """In the region, which is the only one."""

    async def look() -> set[int]:
        async with CrailStore.connect(cluster.client_config("tcp")) as store:
            extents = await store.filesystem.extents((await store.lookup(path)).ino)
        return {
            extent.replicas[0].block + index
            for extent in extents
            for index in range(extent.block_count)
        }

    return trio.run(look)


def sessions_ended(cluster: TwoHosts) -> int:
    """For silence, by the metadata server's log."""
    return cluster.running["metadata"].output().count("its session has ended")


@pytest.mark.timeout(200)
def test_a_stopped_client_writes_nothing_into_blocks_that_are_anothers_now(
    cluster: TwoHosts, rdma_mount: Path
) -> None:
    ended = sessions_ended(cluster)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.cluster.straggler", str(cluster.configuration)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, "it ended before it stopped"
        its_own = set(json.loads(line))
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"it ended with {status}"
        wait_until(lambda: sessions_ended(cluster) > ended, "its session ends", timeout_s=40)
        others: list[Path] = []
        taken: set[int] = set()
        while not its_own <= taken:
            assert len(others) < FILES_MAX, f"not granted again: {its_own - taken}"
            others.append(rdma_mount / f"other{len(others)}")
            others[-1].write_bytes(content(len(others), FILE_BYTES))
            taken |= blocks_of(cluster, f"/{others[-1].name}")
        child.send_signal(signal.SIGCONT)
        said, _ = child.communicate(timeout=90)
    finally:
        child.kill()
        child.wait()
    print(f"{len(its_own)} blocks were granted again to {len(others)} files\n{said}")
    assert said.splitlines() == [f"{LOST}: FencedError", f"{LATER}: written"]
    assert (rdma_mount / LATER[1:]).read_bytes() == FILLING * MIB
    cluster.crail_there("fsck", "--data")
    for number, path in enumerate(others, 1):
        assert path.read_bytes() == content(number, FILE_BYTES)
        path.unlink()
