"""Same host: the region's own file, mapped or opened, through descriptors from its server.

Once attached, the server is not needed any more: a transport goes on working while it is down. It
attaches again only for a region that it does not know yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from crailfs.config import ClientConfig
from crailfs.errors import (
    BlockLostError,
    CrailError,
    DamagedError,
    InvalidError,
    NotSupportedError,
    ProtocolError,
    UnavailableError,
)
from crailfs.limits import CONNECT_TIMEOUT_MS
from crailfs.net.client import RpcClient
from crailfs.net.sending import Buffer
from crailfs.records import StorageServerInfo
from crailfs.transports.direct_region import DirectRegion
from crailfs.transports.file_region import FileRegion
from crailfs.transports.mapped_region import MappedRegion
from crailfs.transports.persistent_region import PersistentRegion
from crailfs.transports.staging import stable
from crailfs.units import MIB
from crailfs.wire.messages import (
    Access,
    AttachedRegion,
    AttachRegions,
    AttachReply,
    FlushMethod,
    Opcode,
    ReportFailed,
    Role,
)

log = logging.getLogger(__name__)


class LocalRegion(Protocol):
    """One region of this host. Offsets are bytes from its first block and lie in it."""

    size_bytes: int
    in_place: bool
    """Whether small writes at any offset cost little; else whole blocks should be written."""

    async def read(self, offset: int, byte_count: int) -> Buffer: ...
    async def write(self, offset: int, data: Buffer) -> None: ...
    async def flush(self) -> bool: ...
    async def close(self) -> None: ...


class LocalTransport:
    """See ``Transport``. The life line that comes with the descriptors is held until ``close``:
    as long as it is open, the server lends none of this client's blocks to anybody else."""

    name = "local"
    write_piece_bytes = 1 * MIB

    def __init__(self, server: StorageServerInfo, config: ClientConfig, client_id: int) -> None:
        self._server = server
        self._config = config
        self._client_id = client_id
        self._regions: dict[int, LocalRegion] = {}
        self._life_line_fd = -1
        self._closed = False
        self._attaching = trio.Lock()
        self._reporting = trio.Lock()

    @classmethod
    async def connect(
        cls, server: StorageServerInfo, config: ClientConfig, client_id: int
    ) -> LocalTransport:
        """Attach to ``server``. Raises ``UnavailableError`` and what the server answers."""
        transport = cls(server, config, client_id)
        try:
            await transport._attach(min(CONNECT_TIMEOUT_MS, config.operation_timeout_ms))
        except BaseException:
            with trio.CancelScope(shield=True):
                await transport.close()  # of what could be opened before another could not
            raise
        return transport

    async def read(self, region: int, offset: int, byte_count: int) -> Buffer:
        target = self._regions.get(region) or await self._find(region)
        _check_bounds(target, region, offset, byte_count)
        try:
            return await target.read(offset, byte_count)
        except DamagedError:
            await self._report(ReportFailed(region, offset, byte_count))
            raise

    async def write(self, region: int, offset: int, generation: int, data: Buffer) -> None:
        target = self._regions.get(region) or await self._find(region)
        _check_bounds(target, region, offset, len(data))
        try:
            await target.write(offset, data)
        except DamagedError:
            await self._report(ReportFailed(region, offset, len(data), writing=True))
            raise

    def in_place(self, region: int) -> bool:
        known = self._regions.get(region)
        return known is not None and known.in_place

    def stage(self, data: Buffer) -> Buffer:
        return stable(data)

    async def flush(self, region: int) -> bool:
        target = self._regions.get(region) or await self._find(region)
        return await target.flush()

    async def close(self) -> None:
        self._closed = True
        while self._regions:
            await self._regions.popitem()[1].close()
        if self._life_line_fd >= 0:
            os.close(self._life_line_fd)
            self._life_line_fd = -1

    async def _find(self, region: int) -> LocalRegion:
        async with self._attaching:
            if self._closed:
                raise UnavailableError(
                    f"the connection to storage server {self._server.id.hex()[:8]} was closed"
                )
            if region not in self._regions:
                await self._attach(self._config.operation_timeout_ms)
        try:
            return self._regions[region]
        except KeyError:
            raise BlockLostError(
                f"storage server {self._server.id.hex()[:8]} has no region {region}"
            ) from None

    async def _attach(self, deadline_ms: int) -> None:
        async def attach(client: RpcClient) -> None:
            reply, fds = await client.call_with_fds(
                Opcode.ATTACH_REGIONS, AttachRegions(self._client_id), deadline_ms=deadline_ms
            )
            self._adopt(reply, fds)

        await self._ask(attach)

    async def _report(self, failed: ReportFailed) -> None:
        """Have the server look at bytes that the device did not deliver or take. One at a time: it
        has enough to do with a device that fails."""

        async def report(client: RpcClient) -> None:
            await client.call(Opcode.REPORT_FAILED, failed, deadline_ms=CONNECT_TIMEOUT_MS)

        async with self._reporting:
            try:
                await self._ask(report)
            except CrailError as error:
                log.warning("a failing device was not reported to its server: %s", error.message)

    async def _ask(self, exchange: Callable[[RpcClient], Awaitable[None]]) -> None:
        """Over a connection of its own. Raises ``CrailError``."""
        client = RpcClient(
            f"unix:{self._server.unix_path}",
            self._config.credentials,
            role=Role.CLIENT,
            client_id=self._client_id,
        )
        failure: CrailError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                await exchange(client)
            except CrailError as error:  # raised here, it would arrive in an exception group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def _adopt(self, reply: object, fds: list[int]) -> None:
        unused = list(fds)
        try:
            if not isinstance(reply, AttachReply) or len(fds) != len(reply.regions) + 1:
                raise ProtocolError(
                    f"storage server {self._server.id.hex()[:8]} sent {len(fds)} descriptors that "
                    "do not match its regions"
                )
            for description, fd in zip(reply.regions, fds[:-1], strict=True):
                if description.region_id not in self._regions:
                    region = _open_region(description, fd, life_line_fd=fds[-1])
                    self._regions[description.region_id] = region
                    unused.remove(fd)
            previous, self._life_line_fd = self._life_line_fd, unused.pop()
            if previous >= 0:
                os.close(previous)
        finally:
            for fd in unused:
                os.close(fd)


def _open_region(description: AttachedRegion, fd: int, *, life_line_fd: int) -> LocalRegion:
    """Takes ``fd`` over. Raises ``NotSupportedError`` for a kind of region that this client does
    not know."""
    match description.access:
        case Access.MAP if description.flush_method is FlushMethod.NONE:
            return MappedRegion(description, fd)
        case Access.MAP:
            return PersistentRegion(description, fd)
        case Access.FILE:
            return FileRegion(description, fd)
        case Access.DIRECT:
            return DirectRegion(description, fd, life_line_fd)
    raise NotSupportedError(
        f"region {description.region_id} is reached by {description.access.name}, which this "
        "client cannot do: take 'local' out of its transports"
    )


def _check_bounds(target: LocalRegion, region: int, offset: int, byte_count: int) -> None:
    if offset < 0 or byte_count < 0 or offset + byte_count > target.size_bytes:
        raise InvalidError(
            f"bytes {offset} to {offset + byte_count} are not in region {region}, which has "
            f"{target.size_bytes}"
        )
