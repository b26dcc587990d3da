"""The storage server's part in RDMA: its regions registered once, and a queue pair for each client.

A client that has connected one reads and writes every registered region without this process
taking notice. What keeps it from blocks that are no longer its own is that the queue pair is
destroyed: when its control connection ends, when the client is cut off, when it connects another
one, and when it writes over TCP to a region that the queue pair reaches. A client is told of, or
counted as, gone only after that.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final, NamedTuple

import trio

from crailfs.config import StorageConfig
from crailfs.errors import NoSpaceError, UnavailableError
from crailfs.net.peer import Peer
from crailfs.rdma.device import Device, open_device
from crailfs.rdma.queue_pair import QueuePair, check_end
from crailfs.rdma.verbs import plain_errors
from crailfs.wire.messages import (
    ConnectQueuePair,
    FlushMethod,
    FlushRung,
    QueuePairReply,
    RemoteRegion,
)
from storage_server.region import Region

log = logging.getLogger(__name__)

_COMPLETIONS: Final = 16
"""A queue pair must have a completion queue; the server's never get any."""


class _Registered(NamedTuple):
    region: Region
    blocks: memoryview
    address: int
    memory: Any
    """The memory region: registered as long as this lives."""
    can_flush: bool


class _Connected(NamedTuple):
    peer: Peer
    pair: QueuePair
    rung: FlushRung


class QueuePairs:
    def __init__(self, device: Device, *, use_flush: bool) -> None:
        """``use_flush``: whether clients may use RDMA FLUSH. Raises ``UnavailableError``."""
        self._device = device
        self._use_flush = use_flush and device.can_flush
        with plain_errors("making a completion queue"):
            self._completions: Any = device.verbs.cq.CQ(device.context, _COMPLETIONS, None, None, 0)
        self._registered: list[_Registered] = []
        self._connected: dict[int, _Connected] = {}
        """By client."""

    @property
    def usable(self) -> bool:
        """Whether there is a region to be reached."""
        return bool(self._registered)

    def reaches(self, region: Region) -> bool:
        return any(registered.region is region for registered in self._registered)

    def register(self, region: Region) -> None:
        """Let clients reach this region from now on. Pins its memory, all of which must be there,
        and holds the interpreter's lock: 0.1 ms/MiB. Raises ``UnavailableError`` for memory
        that the device does not reach, such as that of files on DAX file systems."""
        blocks = region.medium.blocks
        if blocks is None:
            raise UnavailableError("its blocks are not in memory")
        if region.medium.layout.flush_method is FlushMethod.MAPPING:
            raise UnavailableError("what is written to it has to be told to the kernel (msync)")
        enums = self._device.verbs.enums
        access = (
            enums.IBV_ACCESS_LOCAL_WRITE
            | enums.IBV_ACCESS_REMOTE_WRITE
            | enums.IBV_ACCESS_REMOTE_READ
        )
        address = ctypes.addressof(ctypes.c_char.from_buffer(blocks))
        memory, can_flush = None, False
        if region.medium.durable and self._use_flush:
            try:
                memory = self._device.register(address, len(blocks), access | self._flush_access)
                can_flush = True
            except UnavailableError as error:
                log.info("region %s without RDMA FLUSH: %s", region.medium.path, error.message)
        if memory is None:
            memory = self._device.register(address, len(blocks), access)
        self._registered.append(_Registered(region, blocks, address, memory, can_flush))

    # --- clients --------------------------------------------------------------------------------

    def connect(self, peer: Peer, request: ConnectQueuePair) -> QueuePairReply:
        """A queue pair for the client of ``peer``, in place of an earlier one.

        Raises ``InvalidError`` and ``UnavailableError``.
        """
        check_end(request.end)
        self.destroy(peer.client_id)
        flush = self._use_flush and request.end.can_flush
        enums = self._device.verbs.enums
        access = enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
        pair = QueuePair(self._device, self._completions)
        try:
            pair.connect(request.end, access | self._flush_access if flush else access)
        except BaseException:
            pair.destroy()
            raise
        regions = tuple(_describe(registered, flush) for registered in self._registered)
        self._connected[peer.client_id] = _Connected(peer, pair, _rung(regions, flush))
        log.info("%s: queue pair %d for %s", self._device.port.device, pair.end.number, peer)
        return QueuePairReply(pair.end, regions)

    def rung(self, client_id: int) -> FlushRung | None:
        """None: the client has no queue pair."""
        connected = self._connected.get(client_id)
        return None if connected is None else connected.rung

    def destroy(self, client_id: int) -> bool:
        """Afterwards nothing that the client has posted reaches a region any more. True: there was
        a queue pair. Raises ``UnavailableError`` if the device refuses: then it is still there."""
        connected = self._connected.get(client_id)
        if connected is None:
            return False
        connected.pair.destroy()
        del self._connected[client_id]
        log.info("the queue pair of %s is destroyed", connected.peer)
        return True

    def came_over(self, peer: Peer) -> bool:
        """Whether the client's queue pair was connected over this connection."""
        connected = self._connected.get(peer.client_id)
        return connected is not None and connected.peer is peer

    def close(self) -> None:
        """Destroy all queue pairs, let go of the regions' memory. Raises ``UnavailableError``."""
        while self._connected:
            self.destroy(next(iter(self._connected)))
        with plain_errors("giving up registered memory"):
            while self._registered:
                self._registered.pop().memory.close()
            self._completions.close()

    @property
    def _flush_access(self) -> int:
        enums = self._device.verbs.enums
        flags: int = enums.IBV_ACCESS_FLUSH_GLOBAL | enums.IBV_ACCESS_FLUSH_PERSISTENT
        return flags


@contextlib.asynccontextmanager
async def offer_rdma(
    config: StorageConfig, regions: Iterable[Region]
) -> AsyncIterator[QueuePairs | None]:
    """The regions that a device of this host reaches, registered; None if there is no such thing.

    Memory is first taken from the host as a whole, in steps, so that a host that is short of it
    refuses a step instead of ending a process.
    """
    queue_pairs = _open(config)
    if queue_pairs is None:
        yield None
        return
    with contextlib.closing(queue_pairs):
        for region in regions:
            if region.medium.blocks is None:
                continue
            try:
                await _provision(region)
                await trio.to_thread.run_sync(queue_pairs.register, region)
            except (UnavailableError, NoSpaceError) as error:
                path = region.medium.path
                log.warning("region %s is not reached by rdma: %s", path, error.message)
        yield queue_pairs if queue_pairs.usable else None


async def _provision(region: Region) -> None:
    block_count = region.medium.superblock.block_count
    while await trio.to_thread.run_sync(region.medium.provision, block_count):
        pass


def _open(config: StorageConfig) -> QueuePairs | None:
    try:
        address = next((at for at in config.listen if not at.startswith("unix:")), "")
        if not address:
            raise UnavailableError("the server does not listen on TCP")
        near = config.advertise or address.rpartition(":")[0].strip("[]")
        device = open_device(config.rdma_device, near=near)
        return QueuePairs(device, use_flush=config.rdma_flush)
    except UnavailableError as error:
        log.info("rdma is not offered: %s", error.message)
        return None


def _describe(registered: _Registered, flush: bool) -> RemoteRegion:
    can_flush = registered.can_flush and flush
    return RemoteRegion(
        region_id=registered.region.region_id,
        address=registered.address,
        key=registered.memory.rkey,
        byte_count=len(registered.blocks),
        can_flush=can_flush,
        flush_on_request=registered.region.medium.durable and not can_flush,
    )


def _rung(regions: Iterable[RemoteRegion], flush: bool) -> FlushRung:
    """Of persistent memory, if there is any; else what the two ends could do to it."""
    persistent = [region for region in regions if region.can_flush or region.flush_on_request]
    if any(region.can_flush for region in persistent) or (flush and not persistent):
        return FlushRung.RDMA_FLUSH
    return FlushRung.READ_AND_REQUEST
