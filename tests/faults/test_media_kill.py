"""``kill -9`` of storage server and metadata server at instants that a seed chooses, under a load
on a region of persistent memory and on one with direct I/O.

After each kill, before anything is repaired by a server: the pool opens, and every block that the
region's own headers say is some file's has the bytes of its checksum. Meanwhile the load's clients
stay up, and nothing that was acknowledged is lost: after the last round, and every few rounds, all
files are exactly what the steps made them. Then, too, the metadata server's audit finds nothing, no
block is in two extents, and headers and extents say the same.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from crailfs.client.store import CrailStore
from crailfs.wire.messages import ClusterMap
from tests.support.history import History, Step, settle
from tests.support.history_load import make_directories, observe, perform
from tests.support.media_cluster import MediaCluster, media_cluster
from tests.support.region_audit import check_headers, check_ownership, open_offline

ROUNDS = int(os.environ.get("CRAIL_TEST_KILL_ROUNDS", "50"))
SEED = int(os.environ.get("CRAIL_TEST_SEED", "20261204"))
CHECK_EVERY = 10
CLASSES = {"pmem": "pmem", "nvme": "nvme"}
TRANSPORTS = (("local", "tcp"), ("tcp",), ("local", "tcp"))
"""Of each worker of the load."""
UNDER_LOAD_S = 0.4
"""At most so long a load runs until the next kill."""
STEPS_TIMEOUT_S = 30


@pytest.fixture(params=["tmpfs", "file"])
def pmem_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What stands in for persistent memory: with cache-line flushes, or with msync."""
    if request.param == "file":
        yield tmp_path / "pmem"
        return
    path = Path(f"/dev/shm/crailfs-test-{secrets.token_hex(8)}")
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victims", [("storage",), ("metadata",), ("storage", "metadata")])
async def test_servers_killed_under_load(
    victims: tuple[str, ...], tmp_path: Path, pmem_path: Path
) -> None:
    kind = "file" if pmem_path.parent == tmp_path else "tmpfs"
    rounds = -(-ROUNDS // (2 if victims == ("storage",) else 4))  # the rest with the other kind
    print(f"seed {SEED}, {rounds} rounds, persistent memory: {kind}")
    choose = random.Random(f"{SEED}/{victims}/{kind}")
    async with media_cluster(tmp_path, pmem_path) as cluster, AsyncExitStack() as stack:
        workers = []
        for number, transports in enumerate(TRANSPORTS):
            config = cluster.client_config(*transports)
            store = await stack.enter_async_context(CrailStore.connect(config))
            workers.append(_Worker(store, f"w{number}"))
            await make_directories(store, workers[-1].top, CLASSES)
        known = await workers[0].store.filesystem.cluster_map()
        checked_headers = 0
        for first in range(0, rounds, CHECK_EVERY):
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(worker.run)
                for _ in range(min(CHECK_EVERY, rounds - first)):
                    await choose.choice(workers).steps(choose.randrange(1, 12))
                    await trio.sleep(choose.random() * UNDER_LOAD_S)
                    for victim in choose.sample(victims, len(victims)):
                        await cluster.kill(victim)
                    if "storage" in victims:
                        checked_headers += await _check_regions(cluster, known)
                    async with trio.open_nursery() as starting:
                        for victim in victims:
                            starting.start_soon(cluster.start, victim)
                for worker in workers:
                    await worker.steps(3)
                    worker.is_stopping = True
            for worker in workers:
                await worker.check()
            compared = await check_ownership(
                workers[0].store.filesystem, cluster.client_config("tcp")
            )
            assert compared > 0
        assert checked_headers > 0 or "storage" not in victims
        steps = [worker.history.number for worker in workers]
        print(f"{steps} steps, {checked_headers} headers with their blocks checked after kills")


async def _check_regions(cluster: MediaCluster, known: ClusterMap) -> int:
    checked = 0
    for region in cluster.regions:
        medium = await open_offline(region, known.cluster_id, known.block_size_bytes)
        assert medium is not None
        try:
            if medium.headers is not None:
                checked += await check_headers(medium)
        finally:
            medium.close()
    return checked


class _Worker:
    """One client with files of its own."""

    def __init__(self, store: CrailStore, top: str) -> None:
        self.store = store
        self.top = top
        self.history = History(f"{SEED}/{top}", tuple(CLASSES), store.filesystem.block_size_bytes)
        self.is_stopping = False
        self._stepped = trio.Event()

    async def run(self) -> None:
        self.is_stopping = False
        await perform(self.store, self.top, self.history, self._acknowledge)

    async def steps(self, count: int) -> None:
        """Wait until so many more have been acknowledged."""
        with trio.fail_after(STEPS_TIMEOUT_S):
            for _ in range(count):
                await self._stepped.wait()

    async def check(self) -> None:
        """All that was acknowledged is there, and nothing else."""
        settle(
            self.history,
            await observe(self.store, self.top),
            durable=self.history.number,
            acknowledged=self.history.number - 1,
            is_losable=lambda _: False,
        )

    def _acknowledge(self, step: Step) -> bool:
        self._stepped.set()
        self._stepped = trio.Event()
        return not self.is_stopping
