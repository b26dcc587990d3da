"""A mount that is stopped while it writes by RDMA, and goes on when its blocks are another's."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import trio

from crailfs.client.store import CrailStore
from crailfs.units import MIB
from tests.lab.rdma.load import Load, content
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


@pytest.mark.timeout(200)
def test_a_stopped_mount_writes_nothing_into_blocks_that_are_anothers_now(
    cluster: TwoHosts, rdma_mount: Path
) -> None:
    mountpoint = cluster.directory / "stopped"
    with (
        cluster.mount(mountpoint, "rdma") as mount,
        Load(mountpoint / "load", may_fail=True) as load,
    ):
        load.wait_for(3)
        descriptor = os.open(mountpoint / "lost", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"nobody has committed this" * 10_000)
        ended = sessions_ended(cluster)
        mount.process.send_signal(signal.SIGSTOP)
        try:
            whole = load.done
            counts = cluster.audit()
            wait_until(lambda: sessions_ended(cluster) > ended, "its session ends", timeout_s=40)
            # Grants begin with the lowest free blocks: behind what it had committed are its own.
            last = max(blocks_of(cluster, f"/load/{whole - 1}"))
            its_own = set(range(last + 1, last + 1 + 16))
            others: list[Path] = []
            taken: set[int] = set()
            while not its_own & taken:
                assert len(others) < FILES_MAX, f"none of {its_own} was granted again: {counts}"
                others.append(rdma_mount / f"other{len(others)}")
                others[-1].write_bytes(content(len(others), FILE_BYTES))
                taken = blocks_of(cluster, f"/{others[-1].name}")
        finally:
            mount.process.send_signal(signal.SIGCONT)
        with pytest.raises(OSError) as lost:
            os.fsync(descriptor)
        assert lost.value.errno == errno.EIO
        os.close(descriptor)
        load.wait_for(load.done + 3)
        load.check()
        print(f"{len(its_own & taken)} of its blocks are in {others[-1].name}; {load}")
        assert load.errors <= {"EIO"}, "if it was in the middle of a file"
        for number, path in enumerate(others, 1):
            assert path.read_bytes() == content(number, FILE_BYTES)
    cluster.crail_there("fsck", "--data")


def sessions_ended(cluster: TwoHosts) -> int:
    """For silence, by the metadata server's log."""
    return cluster.running["metadata"].output().count("its session has ended")
