"""Servers with a region of persistent memory and one with direct I/O, as processes that are quick
to start again: forked from one that has imported everything.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import trio

from crailfs.config import ClientConfig, Credentials, MetadataConfig, RegionConfig, StorageConfig
from crailfs.records import Tier
from crailfs.units import MIB
from tests.support.processes import die_with_the_test

SECRET = b"the secret of a test cluster"
READY_TIMEOUT_S = 20.0
REGION_BYTES = 96 * MIB
"""Several times what the files take: clients keep granted blocks, too."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["metadata_server.server", "storage_server.server", __name__])


class MediaCluster:
    """``metadata`` and ``storage`` can be killed and started, by name."""

    def __init__(self, directory: Path, regions: tuple[RegionConfig, ...]) -> None:
        self.regions = regions
        self.log = directory / "servers.log"
        address = f"unix:{directory}/metadata.sock"
        credentials = Credentials(cluster_id=b"", secret=SECRET)
        metadata = MetadataConfig(
            state=directory / "metadata", listen=(address,), credentials=credentials
        )
        storage = StorageConfig(
            state=directory / "storage",
            metadata=address,
            listen=(f"unix:{directory}/storage.sock", "127.0.0.1:0"),
            host="testhost",
            regions=regions,
            credentials=credentials,
        )
        self._configs: dict[str, MetadataConfig | StorageConfig] = {
            "metadata": metadata,
            "storage": storage,
        }
        self._running: dict[str, ForkServerProcess] = {}

    def client_config(self, *transports: str) -> ClientConfig:
        metadata = self._configs["metadata"]
        return ClientConfig(
            metadata=metadata.listen[0], credentials=metadata.credentials, transports=transports
        )

    async def start(self, name: str) -> None:
        """Returns when it is ready. Raises ``AssertionError`` if it does not start."""
        await trio.to_thread.run_sync(self._start, name)

    async def kill(self, name: str) -> None:
        """SIGKILL; returns when it is gone."""
        process = self._running.pop(name)
        process.kill()
        await trio.to_thread.run_sync(process.join, READY_TIMEOUT_S)
        assert process.exitcode == -signal.SIGKILL, self.log.read_text()[-3000:]

    def kill_all(self) -> None:
        for process in self._running.values():
            process.kill()
            process.join(READY_TIMEOUT_S)

    def _start(self, name: str) -> None:
        config = self._configs[name]
        ours, theirs = _forks.Pipe(duplex=False)
        process = _forks.Process(target=_serve, args=(name, config, theirs, self.log))
        process.start()
        theirs.close()
        with ours:
            assert ours.poll(READY_TIMEOUT_S), f"{name} is not ready: {self.log.read_text()}"
            try:
                bound = ours.recv()
            except EOFError:
                bound = None
        if bound is None:
            process.join(READY_TIMEOUT_S)
            raise AssertionError(f"{name} did not start: {self.log.read_text()[-3000:]}")
        # After a restart it is where it was.
        self._configs[name] = msgspec.structs.replace(config, listen=tuple(bound))
        self._running[name] = process


@contextlib.asynccontextmanager
async def media_cluster(directory: Path, pmem_path: Path) -> AsyncIterator[MediaCluster]:
    """Both servers started, with regions of tier pmem in the file ``pmem_path`` and of tier nvme in
    a file below ``directory``."""
    cluster = MediaCluster(
        directory,
        (
            RegionConfig(tier=Tier.PMEM, path=pmem_path, size_bytes=REGION_BYTES),
            RegionConfig(tier=Tier.NVME, path=directory / "nvme", size_bytes=REGION_BYTES),
        ),
    )
    try:
        for name in ("metadata", "storage"):
            await cluster.start(name)
        yield cluster
    finally:
        cluster.kill_all()


def _serve(name: str, config: MetadataConfig | StorageConfig, ready: Connection, log: Path) -> None:
    """The process. It ends with the one that it was forked from, and that one with the test."""
    import metadata_server.server
    import storage_server.server

    die_with_the_test()
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    serve: Callable[..., Awaitable[Any]] = (
        metadata_server.server.serve if name == "metadata" else storage_server.server.serve
    )

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(partial(serve, config))
            ready.send(bound)
            ready.close()

    try:
        trio.run(main)
    except BaseException:
        logging.error("%s", traceback.format_exc())
        raise
