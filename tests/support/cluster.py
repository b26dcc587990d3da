"""A whole cluster within the test's own trio loop, audited at its end."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import trio

import metadata_server.server
import storage_server.server
from crailfs.client.filesystem import FileSystem
from crailfs.config import (
    ClientConfig,
    Credentials,
    MetadataConfig,
    RegionConfig,
    StorageConfig,
)
from crailfs.net.client import RpcClient
from crailfs.records import Tier
from crailfs.units import MIB
from crailfs.wire.messages import Audit, AuditReply, Opcode, Role
from metadata_server import sessions
from metadata_server.driver import Driver

SECRET = b"the secret of a test cluster"
BLOCK_SIZE_BYTES = 65_536


class Cluster:
    """One metadata server and one storage server, each of which can be stopped and started."""

    def __init__(self, directory: Path, config: MetadataConfig, storage: StorageConfig) -> None:
        self.directory = directory
        self.metadata_config = config
        self.storage_config = storage
        self.metadata = _Server()
        self.storage = _Server()
        self._nursery: trio.Nursery | None = None

    @property
    def memory_path(self) -> Path:
        """The file of the memory region."""
        return self.storage_config.regions[0].path

    def client_config(self, *transports: str, operation_timeout_ms: int = 10_000) -> ClientConfig:
        return ClientConfig(
            metadata=self.metadata_config.listen[0],
            credentials=self.metadata_config.credentials,
            transports=transports or ("local", "tcp"),
            operation_timeout_ms=operation_timeout_ms,
        )

    def client(self, *transports: str) -> AbstractAsyncContextManager[FileSystem]:
        return FileSystem.connect(self.client_config(*transports))

    async def start_metadata(self) -> None:
        assert self._nursery is not None
        await self.metadata.start(self._nursery, metadata_server.server.serve, self.metadata_config)

    async def start_storage(self) -> None:
        assert self._nursery is not None
        addresses = await self.storage.start(
            self._nursery, storage_server.server.serve, self.storage_config
        )
        # After a restart it is where it was.
        self.storage_config = msgspec.structs.replace(self.storage_config, listen=tuple(addresses))

    def expire_session(self, client_id: int) -> None:
        """While the metadata server is stopped: what it does with a client that is silent."""
        driver = Driver.open(self.metadata_config)
        try:
            driver.run(lambda txn, context: sessions.expire(txn, context, client_id))
            driver.write_batch()
        finally:
            driver.close()

    async def audit(self) -> AuditReply:
        """What the metadata server finds wrong in its own tables."""
        auditor = RpcClient(
            self.metadata_config.listen[0],
            self.metadata_config.credentials,
            role=Role.OPERATOR,
            client_id=1,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(auditor.run)
            reply = await auditor.call(Opcode.AUDIT, Audit(), deadline_ms=10_000)
            nursery.cancel_scope.cancel()
        assert isinstance(reply, AuditReply)
        return reply

    async def run(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        await self.start_metadata()
        await self.start_storage()


class _Server:
    """A server task of its own cancel scope."""

    def __init__(self) -> None:
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def start(self, nursery: trio.Nursery, serve: object, config: object) -> list[str]:
        """Returns the addresses that it listens on."""
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        addresses: list[str] = await nursery.start(self._run, serve, config)
        return addresses

    async def _run(
        self,
        serve: object,
        config: object,
        *,
        task_status: trio.TaskStatus[list[str]],
    ) -> None:
        assert callable(serve)
        try:
            with self._scope:
                await serve(config, task_status=task_status)
        finally:
            self._ended.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._ended.wait()


def server_configs(
    directory: Path,
    regions: tuple[RegionConfig, ...],
    *,
    cluster_id: bytes = b"",
    block_size_bytes: int = BLOCK_SIZE_BYTES,
) -> tuple[MetadataConfig, StorageConfig]:
    """Servers on Unix sockets and a loopback port below ``directory``, without a mover."""
    credentials = Credentials(cluster_id=cluster_id, secret=SECRET)
    metadata = MetadataConfig(
        state=directory / "metadata",
        listen=(f"unix:{directory}/metadata.sock",),
        credentials=credentials,
        block_size_bytes=block_size_bytes,
    )
    storage = StorageConfig(
        state=directory / "storage",
        metadata=metadata.listen[0],
        listen=(f"unix:{directory}/storage.sock", "127.0.0.1:0"),
        host="testhost",
        move_bytes_per_second=0,
        regions=regions,
        credentials=credentials,
    )
    return metadata, storage


@asynccontextmanager
async def running_cluster(
    directory: Path,
    *,
    memory_bytes: int = 16 * MIB,
    disk_bytes: int = 16 * MIB,
    block_size_bytes: int = BLOCK_SIZE_BYTES,
) -> AsyncIterator[Cluster]:
    """Servers with one memory region and one on disk. At the end of the block the metadata auditor
    must find nothing wrong."""
    memory_path = Path(f"/dev/shm/crailfs-test-{uuid.uuid4().hex}")
    regions = (
        RegionConfig(tier=Tier.MEMORY, path=memory_path, size_bytes=memory_bytes),
        RegionConfig(tier=Tier.DISK, path=directory / "disk", size_bytes=disk_bytes),
    )
    configs = server_configs(directory, regions, block_size_bytes=block_size_bytes)
    cluster = Cluster(directory, *configs)
    try:
        async with trio.open_nursery() as nursery:
            await cluster.run(nursery)
            yield cluster
            reply = await cluster.audit()
            assert reply.findings == ()
            nursery.cancel_scope.cancel()
    finally:
        memory_path.unlink(missing_ok=True)  # noqa: ASYNC240
