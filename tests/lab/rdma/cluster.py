"""A storage server that offers RDMA, in this process or one of its own, below the metadata server
of ``tests.storage.cluster``."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import msgspec
import trio

from crailfs.config import RegionConfig, StorageConfig
from crailfs.net.client import RpcClient
from crailfs.records import Tier
from crailfs.transports import connect
from crailfs.transports.rdma import RdmaTransport
from crailfs.units import MIB
from crailfs.wire.messages import Opcode, Role, StorageStatus, StorageStatusReply
from storage_server.server import serve
from tests.storage.cluster import CREDENTIALS, REGION_SIZE, FakeMetadata, client_config

FRONT_BYTES = 2 * MIB
"""Also what mappings of the device are aligned to."""


def wipe(device: Path) -> None:
    """Make persistent memory look new."""
    fd = os.open(device, os.O_RDWR)
    with contextlib.closing(mmap.mmap(fd, FRONT_BYTES)) as front:
        os.close(fd)
        front[:] = bytes(FRONT_BYTES)


def lab_config(
    directory: Path,
    metadata: FakeMetadata,
    regions: dict[Tier, Path],
    *,
    rdma_flush: bool = True,
) -> StorageConfig:
    return StorageConfig(
        state=directory / "state",
        metadata=metadata.address,
        listen=(f"unix:{directory}/storage.sock", "127.0.0.1:0"),
        host="testhost",
        rdma_flush=rdma_flush,
        regions=tuple(
            RegionConfig(tier=tier, path=path, size_bytes=REGION_SIZE)
            for tier, path in regions.items()
        ),
        credentials=CREDENTIALS,
    )


class Lab:
    """A running storage server and connections to it."""

    def __init__(self, metadata: FakeMetadata, nursery: trio.Nursery) -> None:
        self.metadata = metadata
        self.nursery = nursery

    async def transport(self, client_id: int = 42, timeout_ms: int = 20_000) -> RdmaTransport:
        config = client_config(self.metadata, "rdma", timeout_ms=timeout_ms)
        transport = await connect(self.metadata.server, config, client_id, self.nursery)
        assert isinstance(transport, RdmaTransport)
        return transport

    async def status(self) -> StorageStatusReply:
        """As an operator sees it."""
        server = self.metadata.server
        address = f"{server.tcp_host}:{server.tcp_port}"
        client = RpcClient(address, CREDENTIALS, role=Role.OPERATOR, client_id=0)
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            reply = await client.call(Opcode.STORAGE_STATUS, StorageStatus())
            nursery.cancel_scope.cancel()
        assert isinstance(reply, StorageStatusReply)
        return reply


@contextlib.asynccontextmanager
async def lab_running(
    directory: Path, regions: dict[Tier, Path], *, rdma_flush: bool = True
) -> AsyncIterator[Lab]:
    async with FakeMetadata().running(directory) as metadata, trio.open_nursery() as nursery:
        config = lab_config(directory, metadata, regions, rdma_flush=rdma_flush)
        await nursery.start(partial(serve, config))
        yield Lab(metadata, nursery)
        nursery.cancel_scope.cancel()


def save(value: object, path: Path) -> None:
    """For a process of its own."""
    path.write_bytes(msgspec.msgpack.encode(value, enc_hook=str))
