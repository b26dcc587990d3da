"""Where regions are, and the way to each storage server."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from crailfs import transports
from crailfs.config import ClientConfig
from crailfs.errors import BlockLostError, UnavailableError
from crailfs.records import StorageServerInfo
from crailfs.transports import Transport
from crailfs.wire.messages import ClusterMap

log = logging.getLogger(__name__)

_RETRY_MIN_SECONDS: Final = 0.05
_RETRY_MAX_SECONDS: Final = 1.0


class StorageAccess:
    """Connects to a storage server when a block of it is first needed."""

    def __init__(
        self,
        config: ClientConfig,
        nursery: trio.Nursery,
        fetch_map: Callable[[], Awaitable[ClusterMap]],
        client_id: Callable[[], int],
    ) -> None:
        self.reads_wait = False
        """Whether some region is on a device or behind a network: then reading ahead pays."""
        self.reads_are_views = False
        """Whether some region is mapped: then a view that was read lasts until its blocks go."""
        self._config = config
        self._nursery = nursery
        self._fetch_map = fetch_map
        self._client_id = client_id
        self._map: ClusterMap | None = None
        self._by_region: dict[int, Transport] = {}
        self._by_server: dict[bytes, Transport] = {}
        self._locks: dict[bytes, trio.Lock] = {}

    @property
    def transports(self) -> tuple[Transport, ...]:
        """One for each storage server that was needed so far."""
        return tuple(self._by_server.values())

    def known(self, region: int) -> Transport | None:
        return self._by_region.get(region)

    async def transport(self, region: int) -> Transport:
        """Raises ``BlockLostError`` if no server has the region, ``UnavailableError`` if its server
        cannot be reached."""
        return self._by_region.get(region) or await self._connect(region)

    async def discard(self, region: int, transport: Transport) -> None:
        """``transport`` failed: ask where the region is now and connect anew when it is needed."""
        self._map = None
        broken = [server for server, known in self._by_server.items() if known is transport]
        for server in broken:
            del self._by_server[server]
        for known_region in [r for r, known in self._by_region.items() if known is transport]:
            del self._by_region[known_region]
        if broken:
            await transport.close()

    def reset(self) -> None:
        """The client id changed: the servers refuse the old one."""
        old = list(self._by_server.values())
        self._by_server.clear()
        self._by_region.clear()
        for transport in old:
            self._nursery.start_soon(transport.close)

    async def close(self) -> None:
        servers = list(self._by_server.values())
        self._by_server.clear()
        self._by_region.clear()
        for transport in servers:
            await transport.close()

    async def _connect(self, region: int) -> Transport:
        timeout_ms = self._config.operation_timeout_ms
        failures: list[UnavailableError] = []
        with trio.move_on_after(timeout_ms / 1000):
            server_id = await self._server_of(region)
            async with self._locks.setdefault(server_id, trio.Lock()):
                transport = self._by_server.get(server_id)
                if transport is None:
                    transport = await self._reach(server_id, failures)
                    self._by_server[server_id] = transport
                self._by_region[region] = transport
                self.reads_are_views |= transport.in_place(region)
                self.reads_wait |= not transport.in_place(region)
                return transport
        if failures:
            raise failures[-1]
        raise UnavailableError(
            f"the storage server of region {region} was not reached within {timeout_ms} ms: check "
            "that it runs"
        )

    async def _reach(self, server_id: bytes, failures: list[UnavailableError]) -> Transport:
        """Try until it works or the caller gives up; why it did not work goes to ``failures``."""
        delay_s = _RETRY_MIN_SECONDS
        while True:
            server = await self._locate(server_id)
            locate = functools.partial(self._locate, server_id, fresh=True)
            try:
                transport = await transports.connect(
                    server, self._config, self._client_id(), self._nursery, locate
                )
            except UnavailableError as error:
                log.debug("asking anew where storage server %s is: %s", server_id.hex(), error)
                failures.append(error)
                self._map = None
            else:
                log.info("storage server %s (%s): %s", server_id.hex(), server.host, transport.name)
                return transport
            await trio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_MAX_SECONDS)

    async def _locate(self, server_id: bytes, *, fresh: bool = False) -> StorageServerInfo:
        """Where the server is, as the metadata server knows it. Raises ``BlockLostError``."""
        if fresh:
            self._map = None
        for server in (await self._cluster_map()).servers:
            if server.id == server_id:
                return server
        raise BlockLostError(f"storage server {server_id.hex()} is no longer in the cluster")

    async def _server_of(self, region: int) -> bytes:
        for fresh in (False, True):
            if fresh:
                self._map = None
            for placed in (await self._cluster_map()).regions:
                if placed.id == region:
                    return placed.server_id
        raise BlockLostError(f"region {region} is no longer in the cluster: its blocks are lost")

    async def _cluster_map(self) -> ClusterMap:
        if self._map is None:
            self._map = await self._fetch_map()
        return self._map
