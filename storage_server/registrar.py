"""Being a member of the cluster: registration, heartbeats, and what the replies ask for."""

from __future__ import annotations

import logging
import math
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
takes all of the margin in half a second."""
GROWING_S: Final = 2.0
"""How long after the last growth that goes on."""
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
        self._registered = False
        self._growing_until = -math.inf
        self._hurry = trio.Event()

    async def join(self) -> None:
        """Become a member whose space can be used at once.

        Raises what the metadata server answers, and ``UnavailableError`` if it does not.
        """
        for region in self._regions:
            await self._provision_step(region)
        await self._register()
        self._registered = await self._heartbeat()

    async def run(self) -> None:
        """Heartbeats until cancelled; registers again whenever that is needed."""
        while True:
            await self._wait()
            try:
                if not self._registered:
                    await self._register()
                self._registered = await self._heartbeat()
            except InvalidError as error:
                log.warning("registering again: %s", error.message)
                self._registered = False
            except CrailError as error:
                log.warning("no heartbeat: %s", error.message)
            except OSError as error:
                log.error("clients cannot be cut off, their blocks stay reserved: %s", error)

    async def provision(self, region: Region) -> None:
        """Keep ``region`` usable ahead of what is handed out, until cancelled."""
        while True:
            wanted_blocks = region.wanted_blocks
            more = await self._provision_step(region)
            if more is None:
                with trio.move_on_after(NO_SPACE_RETRY_MS / 1000):
                    await region.high_water_raised()
            elif not more and region.wanted_blocks == wanted_blocks:
                await region.high_water_raised()

    async def _provision_step(self, region: Region) -> bool | None:
        """Whether there may be more to do; None: the host has no room."""
        usable_before = region.medium.usable_blocks
        try:
            more = await trio.to_thread.run_sync(region.medium.provision, region.wanted_blocks)
        except NoSpaceError as error:
            log.warning("%s; trying again later", error.message)
            return None
        if region.medium.usable_blocks != usable_before:
            self._hurry.set()
        return more

    async def _register(self) -> None:
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

    async def _heartbeat(self) -> bool:
        """Tell what is here, do what the answer asks for. False: this server is not registered."""
        reply = await self._metadata.call(
            Opcode.STORAGE_HEARTBEAT,
            StorageHeartbeat(
                self._server.id,
                tuple(region.next_state() for region in self._regions),
                self._services.fenced(),
            ),
            deadline_ms=STORAGE_TIMEOUT_MS,
        )
        if not isinstance(reply, HeartbeatReply) or (
            reply.known and len(reply.high_water_blocks) != len(self._regions)
        ):
            raise ProtocolError("the metadata server answered a heartbeat with something else")
        if reply.known:
            if self._services.fence(reply.fence):
                self._hurry.set()
            self._note_use(reply.high_water_blocks)
        return reply.known

    def _note_use(self, high_water_blocks: tuple[int, ...]) -> None:
        for region, block_count in zip(self._regions, high_water_blocks, strict=True):
            raised = block_count > region.high_water_blocks
            region.raise_high_water(block_count)
            if raised and region.medium.usable_blocks < region.medium.superblock.block_count:
                self._growing_until = trio.current_time() + GROWING_S

    async def _wait(self) -> None:
        """Until the next heartbeat is due; never so short that heartbeats become a load."""
        await trio.sleep(GROWING_HEARTBEAT_INTERVAL_MS / 1000)
        if trio.current_time() >= self._growing_until:
            rest_ms = STORAGE_HEARTBEAT_INTERVAL_MS - GROWING_HEARTBEAT_INTERVAL_MS
            with trio.move_on_after(rest_ms / 1000):
                await self._hurry.wait()
        self._hurry = trio.Event()
