"""A client that is stopped while it writes by RDMA, and goes on when its blocks are another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from crailfs.client.store import CrailStore
from crailfs.units import KIB, MIB
from tests.lab.cluster.straggler import FILLING, LATER, LOST
from tests.lab.rdma.load import content
from tests.lab.rdma.two_hosts import TwoHosts
from tests.support.processes import wait_until

FILE_BYTES = 256 * KIB
"""Small, because large files leave out what is not long enough for them."""
FILES_AT_ONCE = 16
FILES_MAX = 256


def blocks_of(cluster: TwoHosts, names: Sequence[str]) -> set[int]:
    """In the region, which is the only one."""

    async def look() -> set[int]:
        blocks: set[int] = set()
        async with CrailStore.connect(cluster.client_config("tcp")) as store:
            for name in names:
                for extent in await store.filesystem.extents((await store.lookup(name)).ino):
                    first = extent.replicas[0].block
                    blocks |= set(range(first, first + extent.block_count))
        return blocks

    return trio.run(look)


def sessions_ended(cluster: TwoHosts) -> int:
    """For silence, by the metadata server's log."""
    return cluster.running["metadata"].output().count("its session has ended")


def is_withheld(cluster: TwoHosts) -> bool:
    """Whether there are blocks that somebody who is gone might still write to."""
    counts = cluster.audit()
    return any(counts.get(f"{state}_blocks") for state in ("reclaim", "clearing"))


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
        wait_until(lambda: not is_withheld(cluster), "its blocks come free", timeout_s=20)
        others: list[Path] = []
        taken: set[int] = set()
        while not its_own <= taken:
            assert len(others) < FILES_MAX, f"not granted again: {its_own - taken}"
            new = [rdma_mount / f"other{len(others) + index}" for index in range(FILES_AT_ONCE)]
            for path in new:
                others.append(path)
                path.write_bytes(content(len(others), FILE_BYTES))
            taken |= blocks_of(cluster, [f"/{path.name}" for path in new])
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
