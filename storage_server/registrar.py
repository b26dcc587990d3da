"""Being a member of the cluster: registration, heartbeats, and what the replies ask for."""

from __future__ import annotations

import logging
from typing import Final

import trio

from crailfs.errors import CrailError, InvalidError, NoSpaceError, ProtocolError, UnavailableError
from crailfs.limits import STORAGE_HEARTBEAT_INTERVAL_MS, STORAGE_TIMEOUT_MS
from crailfs.net.client import RpcClient
from crailfs.records import StorageServerInfo
from crailfs.wire.messages import (
    ClusterMap,
    GetClusterMap,
    HeartbeatReply,
    Opcode,
    RegisterReply,
    RegisterStorage,
    StorageHeartbeat,
)
from storage_server.region import Region
from storage_server.services import Services

log = logging.getLogger(__name__)

GROWING_HEARTBEAT_INTERVAL_MS: Final = 25
"""While memory is being handed out, both sides have to hear of it sooner: a writer of 2 GB/s
takes all of the margin in a quarter of a second."""
NO_SPACE_RETRY_MS: Final = 5_000


async def fetch_cluster_map(metadata: RpcClient) -> ClusterMap:
    """Waits for the metadata server for as long as it takes; refusals are raised."""
    while True:
        try:
            reply = await metadata.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
        except UnavailableError as error:
            log.warning("waiting for the metadata server: %s", error.message)
            continue
        if not isinstance(reply, ClusterMap):
            raise ProtocolError("the metadata server answered for its map with something else")
        return reply


class Registrar:
    """Keeps one storage server registered."""

    def __init__(
        self,
        metadata: RpcClient,
        server: StorageServerInfo,
        regions: list[Region],
        services: Services,
    ) -> None:
        self._metadata = metadata
        self._server = server
        self._regions = regions
        self._services = services
        self._hurry = trio.Event()

    async def register(self) -> None:
        """Tell the metadata server what is here; the regions get their ids.

        Raises what it answers, and ``UnavailableError`` if it does not.
        """
        reply = await self._metadata.call(
            Opcode.REGISTER_STORAGE,
            RegisterStorage(self._server, tuple(region.info for region in self._regions)),
        )
        if not isinstance(reply, RegisterReply) or len(reply.region_ids) != len(self._regions):
            raise ProtocolError("the metadata server answered a registration with something else")
        for region, region_id in zip(self._regions, reply.region_ids, strict=True):
            region.region_id = region_id
        self._services.fence(reply.fence)
        self._services.offer(self._regions)
        log.info("registered as %s on %s", self._server.id.hex(), self._server.host)

    async def run(self) -> None:
        """Heartbeats until cancelled; registers again whenever that is needed."""
        registered = True
        growing = False
        while True:
            if registered:
                await self._wait(growing)
            else:
                await trio.sleep(STORAGE_HEARTBEAT_INTERVAL_MS / 1000)
            try:
                if not registered:
                    await self.register()
                    registered = True
                reply = await self._heartbeat()
                registered = reply.known
                growing = registered and self._obey(reply)
            except InvalidError as error:
                log.warning("registering again: %s", error.message)
                registered = False
            except CrailError as error:
                log.warning("no heartbeat: %s", error.message)
            except OSError as error:
                log.error("clients cannot be cut off, their blocks stay reserved: %s", error)

    async def provision(self, region: Region) -> None:
        """Keep ``region`` usable ahead of what is handed out, until cancelled."""
        while True:
            usable_before = region.medium.usable_blocks
            try:
                more = await trio.to_thread.run_sync(region.medium.provision, region.wanted_blocks)
            except NoSpaceError as error:
                log.warning("%s; trying again later", error.message)
                with trio.move_on_after(NO_SPACE_RETRY_MS / 1000):
                    await region.high_water_raised()
                continue
            if region.medium.usable_blocks != usable_before:
                self._hurry.set()
            if not more:
                await region.high_water_raised()

    async def _heartbeat(self) -> HeartbeatReply:
        reply = await self._metadata.call(
            Opcode.STORAGE_HEARTBEAT,
            StorageHeartbeat(
                self._server.id,
                tuple(region.state for region in self._regions),
                self._services.fenced(),
            ),
            deadline_ms=STORAGE_TIMEOUT_MS,
        )
        if not isinstance(reply, HeartbeatReply) or (
            reply.known and len(reply.high_water_blocks) != len(self._regions)
        ):
            raise ProtocolError("the metadata server answered a heartbeat with something else")
        return reply

    def _obey(self, reply: HeartbeatReply) -> bool:
        """True: space is being handed out just now, and there is more to make usable."""
        self._services.fence(reply.fence)
        growing = False
        for region, high_water_blocks in zip(self._regions, reply.high_water_blocks, strict=True):
            raised = high_water_blocks > region.high_water_blocks
            region.raise_high_water(high_water_blocks)
            if raised and region.medium.usable_blocks < region.medium.superblock.block_count:
                growing = True
        return growing

    async def _wait(self, growing: bool) -> None:
        """Until the next heartbeat is due; never so short that heartbeats become a load."""
        await trio.sleep(GROWING_HEARTBEAT_INTERVAL_MS / 1000)
        if not growing:
            rest_ms = STORAGE_HEARTBEAT_INTERVAL_MS - GROWING_HEARTBEAT_INTERVAL_MS
            with trio.move_on_after(rest_ms / 1000):
                await self._hurry.wait()
        self._hurry = trio.Event()
