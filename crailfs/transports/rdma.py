"""Another host's memory, read and written by the network cards alone: the server's processor has no
part in it.

The authenticated TCP connection to the same server is the control connection: over it the queue
pairs are introduced to each other, and it serves regions that no device can reach, and all of them
while RDMA does not work. A write to persistent memory is durable when ``write`` returns, by the
strongest way that both ends have (``FlushRung``).

What was under way when a queue pair broke is done again, once: over a new queue pair, or over TCP
if there is none to be had. Before that the server destroys its end of the old one, in answering
``ConnectQueuePair`` or in taking a ``WriteBlocks`` for a region that the queue pair reached. So
no packet of the first attempt lands on top of later bytes.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from crailfs.config import ClientConfig
from crailfs.errors import CrailError, InvalidError, ProtocolError, UnavailableError
from crailfs.limits import CONNECT_TIMEOUT_MS
from crailfs.net.sending import Buffer
from crailfs.rdma.buffers import Lease
from crailfs.rdma.device import Device, open_device, source_address
from crailfs.rdma.link import Kind, Link, Request
from crailfs.rdma.queue_pair import check_region
from crailfs.records import StorageServerInfo
from crailfs.transports.tcp import TcpTransport
from crailfs.units import MIB
from crailfs.wire.messages import (
    ConnectQueuePair,
    FlushRegion,
    FlushReply,
    FlushRung,
    Opcode,
    QueuePairReply,
    RemoteRegion,
)

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 8 * MIB
"""In one work request: an extent of 128 blocks of 64 KiB, the usual size of blocks."""
RETRY_RDMA_AFTER_S: Final = 5.0
"""How long TCP is used after a queue pair could not be had."""


class RdmaTransport:
    """See ``Transport``."""

    name = "rdma"
    write_piece_bytes = PIECE_BYTES

    def __init__(self, device: Device, server: StorageServerInfo, nursery: trio.Nursery) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        """``writes``, ``reads``, ``flushes`` (verbs posted), ``doorbells``, ``completions``,
        ``wakeups``, ``waits_in_place``; ``written_bytes``, ``read_bytes``, ``copied_bytes``;
        ``flush_requests`` and ``tcp_operations``; ``queue_pairs``."""
        self._device = device
        self._server = server
        self._nursery = nursery
        self._tcp: TcpTransport
        self._link: Link | None = None
        self._regions: dict[int, RemoteRegion] = {}
        self._connecting = trio.Lock()
        self._suspended_until_s = 0.0
        self._piece_bytes = min(PIECE_BYTES, device.message_max_bytes)

    @classmethod
    async def connect(
        cls,
        server: StorageServerInfo,
        config: ClientConfig,
        client_id: int,
        nursery: trio.Nursery,
        locate: Callable[[], Awaitable[StorageServerInfo]] | None = None,
    ) -> RdmaTransport:
        """As ``TcpTransport.connect``. Also raises ``UnavailableError`` if this host has no device
        or the server has no region that it reaches."""
        device = open_device(config.rdma_device, near=await source_address(server.tcp_host))
        transport = cls(device, server, nursery)
        transport._tcp = await TcpTransport.connect(
            server, config, client_id, nursery, locate, on_disconnected=transport._control_lost
        )
        try:
            transport._link = await transport._establish()
        except BaseException:
            await transport._tcp.close()
            raise
        return transport

    @property
    def rung(self) -> FlushRung:
        """The strongest that writes to this server's persistent memory use."""
        if self._link is None or self._link.failure is not None:
            return FlushRung.TCP
        return min(map(_rung, self._regions.values()), default=FlushRung.TCP)

    def in_place(self, region: int) -> bool:
        return False

    def stage(self, data: Buffer) -> Buffer:
        """The one copy that a write makes: into memory that the device can read."""
        lease = self._device.pool.take(len(data))
        lease.view[:] = data
        self.counters["copied_bytes"] += len(data)
        return lease.view

    async def read(self, region: int, offset: int, byte_count: int) -> Buffer:
        if self._reach(region, offset, byte_count) is not None:
            lease = self._device.pool.take(byte_count)

            async def piece(link: Link, target: RemoteRegion, begin: int, end: int) -> None:
                address, piece_bytes = target.address + offset + begin, end - begin
                await link.perform(
                    Request(Kind.READ, address, target.key, piece_bytes, lease, begin)
                )

            if await self._one_sided(region, offset, byte_count, piece):
                self.counters["read_bytes"] += byte_count
                return lease.view.toreadonly()
        self.counters["tcp_operations"] += 1
        return await self._tcp.read(region, offset, byte_count)

    async def write(self, region: int, offset: int, generation: int, data: Buffer) -> None:
        byte_count = len(data)
        if self._reach(region, offset, byte_count) is not None:
            source = self._device.pool.find(data)
            if source is None:
                source = self._device.pool.find(self.stage(data))
                assert source is not None
            lease = source

            async def piece(link: Link, target: RemoteRegion, begin: int, end: int) -> None:
                await self._write_piece(link, target, offset + begin, end - begin, lease, begin)

            if await self._one_sided(region, offset, byte_count, piece):
                self.counters["written_bytes"] += byte_count
                return
        self.counters["tcp_operations"] += 1
        await self._tcp.write(region, offset, generation, data)

    async def flush(self, region: int) -> bool:
        """Writes to persistent memory were flushed one by one."""
        target = self._regions.get(region)
        if target is None:
            return await self._tcp.flush(region)
        return target.can_flush or target.flush_on_request

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.fail("it was closed")
        await self._tcp.close()

    # --- operations -----------------------------------------------------------------------------

    def _reach(self, region: int, offset: int, byte_count: int) -> RemoteRegion | None:
        """The region as the device sees it; None if it does not. Raises ``InvalidError``."""
        target = self._regions.get(region)
        if target is not None and not (
            byte_count > 0 and 0 <= offset <= target.byte_count - byte_count
        ):
            raise InvalidError(
                f"bytes {offset} to {offset + byte_count} are not in region {region}, which has "
                f"{target.byte_count}"
            )
        return target

    async def _one_sided(
        self,
        region: int,
        offset: int,
        byte_count: int,
        piece: Callable[[Link, RemoteRegion, int, int], Awaitable[None]],
    ) -> bool:
        """Run ``piece(link, target, begin, end)`` over 0..byte_count; all of it anew on a new link
        if the link fails. False: there is no link now."""
        failure: CrailError | None = None
        for _ in range(2):
            link = await self._usable_link()
            target = self._reach(region, offset, byte_count)
            if link is None or target is None:
                return False
            try:
                await self._in_pieces(link, target, byte_count, piece)
                return True
            except CrailError as error:
                if link.failure is None:
                    raise
                failure = error
        assert failure is not None
        raise failure

    async def _in_pieces(
        self,
        link: Link,
        target: RemoteRegion,
        byte_count: int,
        piece: Callable[[Link, RemoteRegion, int, int], Awaitable[None]],
    ) -> None:
        if byte_count <= self._piece_bytes:
            await piece(link, target, 0, byte_count)
            return
        failures: list[CrailError] = []

        async def one(begin: int) -> None:
            try:
                await piece(link, target, begin, min(begin + self._piece_bytes, byte_count))
            except CrailError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for begin in range(0, byte_count, self._piece_bytes):
                nursery.start_soon(one, begin)
        if failures:
            raise failures[0]

    async def _write_piece(
        self,
        link: Link,
        target: RemoteRegion,
        offset: int,
        byte_count: int,
        source: Lease,
        source_offset: int,
    ) -> None:
        address = target.address + offset
        write = Request(Kind.WRITE, address, target.key, byte_count, source, source_offset)
        if target.can_flush:
            await link.perform(write, Request(Kind.FLUSH, address, target.key, byte_count, None))
        elif target.flush_on_request:
            # The READ's answer shows that the bytes before it have come to the server's memory or
            # its processor's caches; what then is left to do only that processor can.
            seen = self._device.pool.take(1)
            last = Request(Kind.READ, address + byte_count - 1, target.key, 1, seen)
            await link.perform(write, last)
            await self._flush_range(target.region_id, offset, byte_count)
        else:
            await link.perform(write)

    async def _flush_range(self, region: int, offset: int, byte_count: int) -> None:
        self.counters["flush_requests"] += 1
        reply = await self._tcp.call(Opcode.FLUSH_REGION, FlushRegion(region, offset, byte_count))
        if not isinstance(reply, FlushReply) or not reply.durable:
            raise ProtocolError(
                f"storage server {self._server.id.hex()[:8]} did not flush region {region} durably"
            )

    # --- the queue pair -------------------------------------------------------------------------

    async def _usable_link(self) -> Link | None:
        """The link, made anew if it failed; None while there is none to be had."""
        link = self._link
        if link is not None and link.failure is None:
            return link
        async with self._connecting:
            link = self._link
            if link is not None and link.failure is None:
                return link
            if trio.current_time() < self._suspended_until_s:
                return None
            self._tcp.check_open()
            try:
                self._link = await self._establish()
            except UnavailableError as error:
                self._tcp.check_open()
                self._suspended_until_s = trio.current_time() + RETRY_RDMA_AFTER_S
                log.warning(
                    "storage server %s (%s) is reached over TCP for now: %s",
                    self._server.id.hex()[:8], self._server.host, error.message,
                )  # fmt: skip
                return None
            return self._link

    async def _establish(self) -> Link:
        """A link that has carried its first byte. Raises ``UnavailableError``, ``FencedError``,
        ``ProtocolError``."""
        link = Link(self._device, self.counters)
        try:
            reply = await self._tcp.call(
                Opcode.CONNECT_QUEUE_PAIR, ConnectQueuePair(link.end), CONNECT_TIMEOUT_MS
            )
            if not isinstance(reply, QueuePairReply):
                raise ProtocolError("the storage server answered a queue pair with something else")
            if not reply.regions:
                raise UnavailableError("the server has no region in memory that its device reaches")
            for region in reply.regions:
                check_region(region)
            link.connect(reply.end)
            self._regions = {region.region_id: region for region in reply.regions}
            self._link = link
            await self._nursery.start(link.run)
        except BaseException:
            link.discard("it was not connected")
            raise
        # Connected at both ends does not mean that packets get through.
        target, seen = reply.regions[0], self._device.pool.take(1)
        try:
            await link.perform(Request(Kind.READ, target.address, target.key, 1, seen))
        except BaseException:
            link.fail("it was given up before its first byte")
            raise
        self.counters["queue_pairs"] += 1
        log.info(
            "storage server %s (%s): queue pair %d on %s, flush by %s",
            self._server.id.hex()[:8], self._server.host, link.end.number,
            self._device.port.device, self.rung.name,
        )  # fmt: skip
        return link

    def _control_lost(self) -> None:
        """The server destroys its end: nothing posted would be answered."""
        if self._link is not None:
            self._link.fail("the control connection was lost")


def _rung(region: RemoteRegion) -> FlushRung:
    if region.can_flush:
        return FlushRung.RDMA_FLUSH
    return FlushRung.READ_AND_REQUEST if region.flush_on_request else FlushRung.TCP
