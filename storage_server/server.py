"""One storage server, from its configuration to its end."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Final

import trio

from crailfs.config import ClientConfig, Credentials, StorageConfig
from crailfs.errors import ConfigurationError, CrailError
from crailfs.limits import REGIONS_PER_SERVER_MAX
from crailfs.net import server as net_server
from crailfs.net.client import RpcClient
from crailfs.records import StorageServerInfo
from crailfs.transports import read_boot_id
from crailfs.wire.messages import ClusterMap, Role
from storage_server.fencing import Fencing
from storage_server.header_follower import HeaderFollower
from storage_server.media import Medium, open_medium
from storage_server.media.pmem import PmemMedium
from storage_server.media.pmem_numa import run_near
from storage_server.mover import Mover
from storage_server.queue_pairs import offer_rdma
from storage_server.region import Region
from storage_server.registrar import Registrar, fetch_cluster_map
from storage_server.services import OPERATIONS, Services
from storage_server.state import KnownRegion, State

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S: Final = 30.0
"""Between removals of the life lines that clients have let go."""


async def serve(
    config: StorageConfig, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve ``config``'s regions until cancelled.

    Started, with the addresses that it is bound to, once it has registered with the metadata
    server, for which it waits. Raises ``ConfigurationError``, ``BusyError``, ``DamagedError`` and
    ``NoSpaceError`` about its regions and directories, and the metadata server's refusals.
    """
    _check(config)
    state = await trio.to_thread.run_sync(State.open, config.state)
    with contextlib.closing(state), _plain_errors():
        fencing = Fencing(config.state)
        fencing.sweep()
        async with trio.open_nursery() as nursery:
            metadata = RpcClient(
                config.metadata,
                config.credentials,
                role=Role.STORAGE_SERVER,
                # A new one each time: request ids begin anew, and an answer that the metadata
                # server remembers must not be taken for the answer to another request.
                client_id=secrets.randbelow((1 << 64) - 1) + 1,
            )
            await nursery.start(metadata.run)
            cluster = await fetch_cluster_map(metadata)
            state.check_cluster(cluster.cluster_id)
            async with _open_media(config, cluster, state) as media:
                regions = [Region(medium) for medium in media]
                async with (
                    offer_rdma(config, regions) as queue_pairs,
                    trio.open_nursery() as work,
                ):
                    services = Services(fencing, work, queue_pairs)
                    bound: list[str] = await work.start(
                        _listen, config, cluster.cluster_id, services, state.epoch
                    )
                    server = _describe(config, state, bound, rdma=queue_pairs is not None)
                    registrar = Registrar(metadata, server, regions, services)
                    await registrar.join()
                    for region in regions:
                        work.start_soon(registrar.provision, region)
                    work.start_soon(registrar.run)
                    follower = HeaderFollower(metadata, state.server_id, regions, services)
                    work.start_soon(follower.run)
                    work.start_soon(_sweep, fencing)
                    if config.move_bytes_per_second:
                        mover = Mover(
                            metadata,
                            state.server_id,
                            _as_client(config),
                            bytes_per_second=config.move_bytes_per_second,
                            requests_served=lambda: services.requests_served,
                            counters=services.counters,
                        )
                        work.start_soon(mover.run)
                    task_status.started(bound)


@contextlib.asynccontextmanager
async def _open_media(
    config: StorageConfig, cluster: ClusterMap, state: State
) -> AsyncIterator[list[Medium]]:
    with contextlib.ExitStack() as opened:
        media: list[Medium] = []
        for region in config.regions:
            medium = await trio.to_thread.run_sync(
                partial(
                    open_medium,
                    region,
                    cluster_id=cluster.cluster_id,
                    block_size_bytes=cluster.block_size_bytes,
                    known_uuid=state.known_uuid(region.path),
                )
            )
            opened.callback(medium.close)
            media.append(medium)
        run_near([medium.numa_node for medium in media if isinstance(medium, PmemMedium)])
        state.remember(
            cluster.cluster_id,
            [
                KnownRegion(str(medium.path), medium.superblock.region_uuid.hex())
                for medium in media
            ],
        )
        yield media


async def _listen(
    config: StorageConfig,
    cluster_id: bytes,
    services: Services,
    epoch: int,
    *,
    task_status: trio.TaskStatus[list[str]],
) -> None:
    await net_server.serve(
        config.listen,
        services,
        Credentials(cluster_id=cluster_id, secret=config.credentials.secret),
        epoch=epoch,
        operations=OPERATIONS,
        task_status=task_status,
    )


def _as_client(config: StorageConfig) -> ClientConfig:
    """Of the mover."""
    return ClientConfig(
        metadata=config.metadata,
        credentials=config.credentials,
        host=config.host,
        rdma_device="off",
        transports=("local", "tcp"),
    )


async def _sweep(fencing: Fencing) -> None:
    while True:
        await trio.sleep(SWEEP_INTERVAL_S)
        fencing.sweep()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """A nursery wraps what ends it in a group; the caller wants the refusal itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        refusals, others = group.split(CrailError)
        if refusals is None or others is not None:
            raise
        refusal: BaseException = refusals
        while isinstance(refusal, BaseExceptionGroup):
            refusal = refusal.exceptions[0]
        raise refusal from None


def _check(config: StorageConfig) -> None:
    unix = [address for address in config.listen if address.startswith("unix:")]
    if not config.listen or len(unix) > 1 or len(config.listen) - len(unix) > 1:
        raise ConfigurationError(
            f"listen = {list(config.listen)}: a storage server listens on at most one unix:/path "
            "and at most one host:port, and on at least one of them"
        )
    if not 1 <= len(config.regions) <= REGIONS_PER_SERVER_MAX:
        raise ConfigurationError(
            f"{len(config.regions)} regions: a storage server has 1 to {REGIONS_PER_SERVER_MAX}"
        )
    paths = [str(region.path) for region in config.regions]
    if len(set(paths)) != len(paths):
        raise ConfigurationError(f"two regions have the same path: {', '.join(sorted(paths))}")


def _describe(
    config: StorageConfig, state: State, bound: list[str], *, rdma: bool
) -> StorageServerInfo:
    """What clients are told: ``bound`` are the addresses with the ports that were free."""
    unix_path, tcp_host, tcp_port = "", "", 0
    for address in bound:
        if address.startswith("unix:"):
            unix_path = os.path.abspath(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            tcp_host, tcp_port = config.advertise or host.strip("[]"), int(port)
    host_name = socket.gethostname()
    if tcp_host in ("0.0.0.0", "::"):
        tcp_host = host_name
    return StorageServerInfo(
        id=state.server_id,
        host=config.host or host_name,
        rack=config.rack,
        unix_path=unix_path,
        tcp_host=tcp_host,
        tcp_port=tcp_port,
        boot_id=read_boot_id(),
        rdma=rdma,
    )
