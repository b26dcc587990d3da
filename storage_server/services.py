"""What the storage server answers to its clients.

Memory: a payload is received straight into the block, so a write is done when it is complete, and
a read is sent straight from the block. Devices: what need not wait for one is done in place, the
rest in tasks.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import resource
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final

import trio

from crailfs.errors import (
    AuthenticationError,
    BlockLostError,
    CrailError,
    DamagedError,
    InvalidError,
    NotPermittedError,
    NotSupportedError,
    TryAgainError,
    UnavailableError,
)
from crailfs.limits import LEASE_MS
from crailfs.net.server import Peer
from crailfs.units import MIB
from crailfs.wire.messages import (
    AttachRegions,
    AttachReply,
    ClientConnection,
    ConnectQueuePair,
    Empty,
    FlushMethod,
    FlushRegion,
    FlushReply,
    FlushRung,
    Message,
    Opcode,
    ReadBlocks,
    ReadHeaders,
    ReportFailed,
    Role,
    StorageStatus,
    StorageStatusReply,
    Welcome,
    WriteBlocks,
)
from storage_server.buffers import Buffers
from storage_server.failures import Where, retire_failing
from storage_server.fencing import Fencing
from storage_server.queue_pairs import QueuePairs
from storage_server.region import Region

log = logging.getLogger(__name__)

PERSISTED_IN_PLACE_MAX_BYTES: Final = 8 * MIB
"""In the event loop: what a client has written in one go, about 1 ms. More goes to a thread."""

OPERATIONS: Final = frozenset(
    {
        Opcode.ATTACH_REGIONS,
        Opcode.READ_BLOCKS,
        Opcode.WRITE_BLOCKS,
        Opcode.FLUSH_REGION,
        Opcode.READ_HEADERS,
        Opcode.REPORT_FAILED,
        Opcode.STORAGE_STATUS,
        Opcode.CONNECT_QUEUE_PAIR,
    }
)


class Services:
    """The ``Handler`` of the storage server's connections. Work in threads runs in ``nursery``."""

    def __init__(
        self, fencing: Fencing, nursery: trio.Nursery, queue_pairs: QueuePairs | None = None
    ) -> None:
        """``queue_pairs`` None: RDMA is not offered."""
        self._fencing = fencing
        self._queue_pairs = queue_pairs
        self._nursery = nursery
        self._buffers = Buffers()
        self._peers: dict[int, set[Peer]] = {}
        self._writes_under_way: collections.Counter[int] = collections.Counter()
        self._must_fence: set[int] = set()
        self._regions: dict[int, Region] | None = None
        self.counters: collections.Counter[str] = collections.Counter()

    def offer(self, regions: Iterable[Region]) -> None:
        """Serve these regions from now on, under their ids."""
        self._regions = {region.region_id: region for region in regions}

    @property
    def requests_served(self) -> int:
        """Reads, writes and flushes so far."""
        return sum(self.counters[name] for name in ("reads", "writes", "flushes"))

    # --- fencing --------------------------------------------------------------------------------

    def fence(self, client_ids: Iterable[int]) -> bool:
        """Cut off these clients, the ones to cut off at present; ``fenced`` tells when that has
        come true. True: somebody new is among them. Raises ``OSError`` if it cannot be recorded."""
        clients = set(client_ids)
        self._fencing.refuse(clients)
        fresh = not clients <= self._must_fence
        self._must_fence = clients
        for client_id in clients:
            with _logged("cutting off a client"):  # until it works, ``fenced`` does not name it
                self._destroy_queue_pair(client_id)
            for peer in tuple(self._peers.get(client_id, ())):
                peer.close(f"client {client_id:016x} lost its session")
        return fresh

    def fenced(self) -> tuple[int, ...]:
        """Of the clients to cut off: those that can write nothing any more."""
        return tuple(
            client_id
            for client_id in sorted(self._must_fence)
            if client_id not in self._peers
            and not self._writes_under_way[client_id]
            and not self._has_queue_pair(client_id)
            and not self._fencing.has_life_line(client_id)
        )

    # --- the handler of crailfs.net.server ------------------------------------------------------

    def welcome(self, peer: Peer) -> Welcome:
        if peer.role not in (Role.CLIENT, Role.OPERATOR):
            raise AuthenticationError(
                f"a storage server serves clients and operators, not {peer.role.name.lower()}s: "
                "check the address"
            )
        self._fencing.check(peer.client_id)
        self._peers.setdefault(peer.client_id, set()).add(peer)
        return Welcome(session_is_new=False, lease_ms=LEASE_MS)

    def disconnected(self, peer: Peer) -> None:
        peers = self._peers.get(peer.client_id, set())
        peers.discard(peer)
        if not peers:
            self._peers.pop(peer.client_id, None)
        if self._queue_pairs is not None and self._queue_pairs.came_over(peer):
            with _logged("after a disconnection"):
                self._destroy_queue_pair(peer.client_id)

    def payload_target(
        self, peer: Peer, opcode: Opcode, request: Message, byte_count: int
    ) -> memoryview:
        if not isinstance(request, WriteBlocks):
            raise InvalidError(f"{opcode.name} takes no payload")
        region = self._claim(request, byte_count)
        if self._queue_pairs is not None and self._queue_pairs.reaches(region):
            # It gave up a queue pair on which an earlier attempt at these bytes may be on its way.
            self._destroy_queue_pair(peer.client_id)
        if region.medium.blocks is None:
            return self._buffers.take(byte_count)
        return region.medium.blocks[request.offset : request.offset + byte_count]

    def request(
        self,
        peer: Peer,
        opcode: Opcode,
        request_id: int,
        request: Message,
        payload: memoryview | None,
    ) -> None:
        match request:
            case ReadBlocks():
                self._read(peer, request_id, request)
            case WriteBlocks():
                self._write(peer, request_id, request, payload)
            case FlushRegion():
                self._flush(peer, request_id, request)
            case ReadHeaders():
                self._read_headers(peer, request_id, request)
            case ReportFailed():
                self._look_for_failure(peer, request_id, request)
            case AttachRegions():
                self._attach(peer, request_id, request)
            case ConnectQueuePair():
                self._connect_queue_pair(peer, request_id, request)
            case StorageStatus():
                counters = {**self.counters, **_own_use()}
                peer.reply(request_id, StorageStatusReply(counters, self._clients()))
            case _:
                raise NotSupportedError(f"a storage server does not answer {opcode.name}")

    def batch_done(self) -> None:
        """Replies wait for nothing here."""

    # --- operations -----------------------------------------------------------------------------

    def _read(self, peer: Peer, request_id: int, request: ReadBlocks) -> None:
        region = self._region(request.region)
        region.check_range(request.offset, request.byte_count)
        self.counters["reads"] += 1
        self.counters["read_bytes"] += request.byte_count
        if region.medium.blocks is not None:
            view = region.medium.blocks[request.offset : request.offset + request.byte_count]
            peer.reply(request_id, Empty(), payload=view)
            return
        buffer = self._buffers.take(request.byte_count)
        where = Where(region, request.offset, request.byte_count)
        try:
            done = region.medium.try_read(request.offset, buffer)
        except OSError as error:
            self._nursery.start_soon(self._device_failed, peer, request_id, where, error)
            return
        if done:
            peer.reply(request_id, Empty(), payload=buffer)
            return

        async def read() -> None:
            await region.medium.read(request.offset, buffer)
            peer.reply(request_id, Empty(), payload=buffer)

        self._nursery.start_soon(self._at_device, peer, request_id, where, read)

    def _write(
        self, peer: Peer, request_id: int, request: WriteBlocks, payload: memoryview | None
    ) -> None:
        if payload is None:
            raise InvalidError("a write without bytes")
        # Claimed a second time: blocks may have been granted again while the payload arrived.
        region = self._claim(request, len(payload))
        self.counters["writes"] += 1
        self.counters["written_bytes"] += len(payload)
        if region.medium.blocks is not None:
            region.medium.persist(request.offset, len(payload))
            peer.reply(request_id, Empty())
            return
        where = Where(region, request.offset, len(payload), writing=True)
        try:
            done = region.medium.try_write(request.offset, payload)
        except OSError as error:
            self._nursery.start_soon(self._device_failed, peer, request_id, where, error)
            return
        if done:
            peer.reply(request_id, Empty())
            return
        self._writes_under_way[peer.client_id] += 1

        async def write() -> None:
            try:
                await region.medium.write(request.offset, payload)
            finally:
                self._writes_under_way[peer.client_id] -= 1
            peer.reply(request_id, Empty())

        self._nursery.start_soon(self._at_device, peer, request_id, where, write)

    def _flush(self, peer: Peer, request_id: int, request: FlushRegion) -> None:
        region = self._region(request.region)
        medium = region.medium
        self.counters["flushes"] += 1
        if request.byte_count:
            region.check_inside(request.offset, request.byte_count)
        persists = medium.blocks is not None and medium.layout.flush_method != FlushMethod.MAPPING
        persist = partial(medium.persist, request.offset, request.byte_count)
        if request.byte_count and persists:
            self.counters["range_flushes"] += 1
            if request.byte_count <= PERSISTED_IN_PLACE_MAX_BYTES:
                persist()
                peer.reply(request_id, FlushReply(durable=medium.durable))
                return

        async def flush() -> None:
            if request.byte_count and persists:
                await trio.to_thread.run_sync(persist)
            peer.reply(request_id, FlushReply(durable=await medium.flush()))

        where = Where(region, action="flushing")
        self._nursery.start_soon(self._at_device, peer, request_id, where, flush)

    def _read_headers(self, peer: Peer, request_id: int, request: ReadHeaders) -> None:
        if peer.role is not Role.OPERATOR:
            raise NotPermittedError("block headers are for operators")
        region = self._region(request.region)

        async def read() -> None:
            peer.reply(
                request_id, await region.read_headers(request.first_block, request.header_limit)
            )

        where = Where(region, action="reading its block headers")
        self._nursery.start_soon(self._at_device, peer, request_id, where, read)

    def _attach(self, peer: Peer, request_id: int, request: AttachRegions) -> None:
        if not peer.is_local:
            raise NotSupportedError("regions can be attached only over the Unix socket")
        if request.client_id != peer.client_id:
            raise InvalidError(
                f"client {peer.client_id:016x} cannot attach as {request.client_id:016x}"
            )
        if self._regions is None:
            raise _not_registered()
        regions = list(self._regions.values())
        life_line_fd = self._fencing.new_life_line(peer.client_id)
        try:
            peer.reply(
                request_id,
                AttachReply(tuple(region.attached for region in regions)),
                fds=[*(region.medium.shared_fd for region in regions), life_line_fd],
            )
        finally:
            os.close(life_line_fd)
        self.counters["attaches"] += 1

    def _connect_queue_pair(self, peer: Peer, request_id: int, request: ConnectQueuePair) -> None:
        if self._queue_pairs is None:
            raise NotSupportedError("this storage server does not offer rdma: use tcp")
        if self._regions is None:
            raise _not_registered()
        if peer.role is not Role.CLIENT:
            raise NotPermittedError("queue pairs are for clients")
        self._destroy_queue_pair(peer.client_id)
        peer.reply(request_id, self._queue_pairs.connect(peer, request))
        self.counters["queue_pairs_connected"] += 1

    def _clients(self) -> tuple[ClientConnection, ...]:
        """Those that are connected, and those of this host that have attached the regions and need
        no connection."""
        connected = tuple(
            self._describe(peer)
            for peers in self._peers.values()
            for peer in peers
            if peer.role is Role.CLIENT
        )
        attached = tuple(
            ClientConnection(client_id, "this host", "local")
            for client_id in sorted(self._fencing.attached_clients() - set(self._peers))
        )
        return connected + attached

    # --- helpers --------------------------------------------------------------------------------

    def _describe(self, peer: Peer) -> ClientConnection:
        rung = None if self._queue_pairs is None else self._queue_pairs.rung(peer.client_id)
        if rung is not None:
            return ClientConnection(peer.client_id, peer.description, "rdma", rung)
        transport = "local" if peer.is_local else "tcp"
        return ClientConnection(peer.client_id, peer.description, transport, FlushRung.TCP)

    def _has_queue_pair(self, client_id: int) -> bool:
        return self._queue_pairs is not None and self._queue_pairs.rung(client_id) is not None

    def _destroy_queue_pair(self, client_id: int) -> None:
        """Raises ``UnavailableError`` if the device refuses."""
        if self._queue_pairs is not None and self._queue_pairs.destroy(client_id):
            self.counters["queue_pairs_destroyed"] += 1

    def _region(self, region_id: int) -> Region:
        if self._regions is None:
            raise _not_registered()
        try:
            return self._regions[region_id]
        except KeyError:
            raise BlockLostError(f"this storage server has no region {region_id}") from None

    def _claim(self, request: WriteBlocks, byte_count: int) -> Region:
        region = self._region(request.region)
        region.check_range(request.offset, byte_count)
        region.claim(request.offset, byte_count, request.generation)
        return region

    async def _at_device(
        self, peer: Peer, request_id: int, where: Where, work: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            await work()
        except CrailError as error:
            peer.reply_error(request_id, error)
        except OSError as error:
            await self._device_failed(peer, request_id, where, error)

    async def _device_failed(
        self, peer: Peer, request_id: int, where: Where, error: OSError
    ) -> None:
        """Blocks at fault are retired before the client hears of it."""
        self.counters["device_errors"] += 1
        path = where.region.medium.path
        log.error("region %s, %s: %s", path, where, error.strerror)
        await retire_failing(where, error.errno or errno.EIO)
        peer.reply_error(
            request_id,
            DamagedError(f"region {path}, {where}: {error.strerror}; check the device under it"),
        )

    def _look_for_failure(self, peer: Peer, request_id: int, request: ReportFailed) -> None:
        if not peer.is_local:
            raise NotPermittedError("only clients of this host use a device themselves")
        region = self._region(request.region)
        region.check_range(request.offset, request.byte_count)
        if region.medium.blocks is not None:
            raise NotSupportedError("only devices are looked at, not memory")

        async def look() -> None:
            where = Where(region, request.offset, request.byte_count, writing=request.writing)
            if await retire_failing(where, errno.EIO):
                self.counters["device_errors"] += 1
            peer.reply(request_id, Empty())

        self._nursery.start_soon(look)


@contextlib.contextmanager
def _logged(action: str) -> Iterator[None]:
    try:
        yield
    except UnavailableError as error:
        log.error("%s: %s", action, error.message)


def _own_use() -> dict[str, int]:
    """What this process has taken of its host's processors."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wakeups": usage.ru_nvcsw,
        "processor_us": round((usage.ru_utime + usage.ru_stime) * 1e6),
    }


def _not_registered() -> TryAgainError:
    return TryAgainError("this storage server has not yet registered with the metadata server")
