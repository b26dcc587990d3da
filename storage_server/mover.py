"""Moves blocks out of this server's regions to another tier, as the metadata server asks for it.

It does so as a client: blocks of the other tier are granted to it, it copies into them what it has
verified, flushes them, and asks the metadata server to put them in the place of the old ones, which
refuses if the file has others there by now. So whatever ends it, the file has all of its bytes, and
the copies come free with its session. A session lasts as long as there is something to move.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NamedTuple

import trio
from msgspec.structs import replace
from xxhash import xxh3_64_intdigest

from crailfs.client.background import background_nursery
from crailfs.client.block_map import cut
from crailfs.client.session import Session
from crailfs.client.storage import StorageAccess
from crailfs.config import ClientConfig
from crailfs.errors import (
    BlockLostError,
    ChecksumError,
    ConflictError,
    CrailError,
    DamagedError,
    InvalidError,
    NoSpaceError,
    ProtocolError,
    StaleError,
    UnavailableError,
)
from crailfs.limits import STORAGE_TIMEOUT_MS
from crailfs.net.client import RpcClient
from crailfs.records import Extent, Location, Run, StorageClass, Tier
from crailfs.units import KIB, MIB
from crailfs.wire.messages import (
    ClusterMap,
    GetClusterMap,
    Grant,
    GrantBlocks,
    Invalidation,
    Move,
    MoveExtent,
    Moves,
    NextMoves,
    Opcode,
    ReturnBlocks,
)

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
"""Between questions when there was nothing that could be moved."""
PAUSE_S: Final = 0.02
"""And otherwise: an answer may cost the metadata server some milliseconds."""
MOVES_PER_STEP: Final = 32
PIECE_BYTES: Final = 512 * KIB
"""Copied in one go; reading, checking and writing them in memory takes 0.2 to 0.5 ms."""
FLUSHED_AT_ONCE_BYTES: Final = 8 * MIB
QUIET_S: Final = 0.01
"""A server that was asked for nothing for this long is idle."""
PAUSE_MAX_S: Final = 0.5
"""How long one piece waits for an idle server, so that a busy one moves something too."""
_GRANT_TIMEOUT_MS: Final = 2_000
_END_S: Final = 1.0
_CHECKSUM: Final = struct.Struct("<Q")


class _Copy(NamedTuple):
    """Written, and not yet in the place of the old blocks."""

    move: Move
    runs: tuple[Run, ...]
    extents: tuple[Extent, ...]


class Mover:
    """``requests_served`` counts what clients ask of this server: while it moves, the mover pauses,
    unless a tier is nearly full. ``counters`` gets ``demoted_bytes``, ``promoted_bytes`` and
    ``move_conflicts``."""

    def __init__(
        self,
        metadata: RpcClient,
        server_id: bytes,
        config: ClientConfig,
        *,
        bytes_per_second: int,
        requests_served: Callable[[], int],
        counters: Counter[str],
    ) -> None:
        self._metadata = metadata
        self._server_id = server_id
        self._config = config
        self._bytes_per_second = bytes_per_second
        self._requests_served = requests_served
        self._served_before = requests_served()
        self._next_piece_s = 0.0
        self._counters = counters

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            more = False
            try:
                more = await self.step()
            except CrailError as error:
                log.warning("moving between tiers will be tried again: %s", error.message)
            await trio.sleep(PAUSE_S if more else INTERVAL_S)

    async def step(self) -> bool:
        """Ask what to move, and move it. True: there may be more that can be moved."""
        moves = await self._metadata.call(
            Opcode.NEXT_MOVES,
            NextMoves(self._server_id, MOVES_PER_STEP),
            deadline_ms=STORAGE_TIMEOUT_MS,
        )
        if not isinstance(moves, Moves):
            raise ProtocolError("the metadata server answered for moves with something else")
        if not moves.moves:
            return moves.more
        moved_before = self._moved_bytes
        async with _connected(self._config) as (session, storage):
            pace = partial(self._pace, moves.urgent)
            carrier = _Carrier(session, storage, self._config, pace, self._counters)
            await carrier.carry_out(moves.moves)
        return self._moved_bytes > moved_before

    @property
    def _moved_bytes(self) -> int:
        return self._counters["promoted_bytes"] + self._counters["demoted_bytes"]

    async def _pace(self, urgent: bool, byte_count: int) -> None:
        """Before a piece of so many bytes: wait for its turn, and for the foreground."""
        now_s = trio.current_time()
        self._next_piece_s = max(now_s, self._next_piece_s)
        await trio.sleep_until(self._next_piece_s)
        self._next_piece_s += byte_count / self._bytes_per_second
        give_up_s = trio.current_time() + PAUSE_MAX_S
        while not urgent and trio.current_time() < give_up_s:
            served = self._requests_served()
            if served == self._served_before:
                return
            self._served_before = served
            await trio.sleep(QUIET_S)


@asynccontextmanager
async def _connected(config: ClientConfig) -> AsyncIterator[tuple[Session, StorageAccess]]:
    """A session of our own. At its end all that is still granted goes back."""

    async def nothing_cached(entries: tuple[Invalidation, ...]) -> tuple[int, ...]:
        return ()

    async def nothing_kept() -> None:
        pass

    def lost() -> None:
        storage.reset()

    async with background_nursery() as nursery:
        session = Session(
            config,
            on_invalidate=nothing_cached,
            on_lost=lost,
            on_tick=nothing_kept,
            open_inodes=tuple,
        )

        async def fetch_map() -> ClusterMap:
            reply: ClusterMap = await session.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
            return reply

        storage = StorageAccess(config, nursery, fetch_map, lambda: session.client_id)
        await nursery.start(session.run)
        try:
            yield session, storage
        finally:
            with trio.move_on_after(_END_S, shield=True):
                await storage.close()
                await session.end()


class _Carrier:
    """Carries out one answer of the metadata server, in one session. ``pace`` is awaited before
    each piece with its length in bytes."""

    def __init__(
        self,
        session: Session,
        storage: StorageAccess,
        config: ClientConfig,
        pace: Callable[[int], Awaitable[None]],
        counters: Counter[str],
    ) -> None:
        self._session = session
        self._storage = storage
        self._config = config
        self._pace = pace
        self._counters = counters
        self._block_size_bytes = 0
        self._tiers: dict[int, Tier] = {}

    async def carry_out(self, moves: Sequence[Move]) -> None:
        """Move what can be moved. Raises what makes the session useless: its end gives back all
        that is granted to it."""
        cluster: ClusterMap = await self._session.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
        self._block_size_bytes = cluster.block_size_bytes
        self._tiers = {region.id: region.info.tier for region in cluster.regions}
        copies: list[_Copy] = []
        byte_count = 0
        for move in moves:
            try:
                runs = await self._granted(move)
            except UnavailableError:
                # As a rule blocks have yet to come free: what is copied does not wait for that.
                await self._put_in_place(copies)
                raise
            extents = await self._copied(move.extent, runs)
            if extents is None:
                await self._give_back(runs)
                continue
            copies.append(_Copy(move, runs, extents))
            byte_count += move.extent.block_count * self._block_size_bytes
            if byte_count >= FLUSHED_AT_ONCE_BYTES:
                await self._put_in_place(copies)
                copies, byte_count = [], 0
        await self._put_in_place(copies)

    async def _granted(self, move: Move) -> tuple[Run, ...]:
        """Blocks of the other tier for all of the extent, or none. Raises ``UnavailableError`` if
        there are none yet."""
        runs: list[Run] = []
        missing = move.extent.block_count
        while missing:
            request = GrantBlocks(
                StorageClass(move.tier, move.tier),
                move.attributes.placement.location,
                self._config.host or socket.gethostname(),
                missing,
                missing,
            )
            try:
                grant: Grant = await self._session.call(
                    Opcode.GRANT_BLOCKS, request, deadline_ms=_GRANT_TIMEOUT_MS
                )
            except NoSpaceError:
                await self._give_back(runs)
                return ()
            runs += grant.runs
            missing -= sum(run.block_count for run in grant.runs)
        return tuple(runs)

    async def _copied(self, extent: Extent, runs: Sequence[Run]) -> tuple[Extent, ...] | None:
        """The extent as it is in ``runs``, with its bytes there; ``None``: it cannot be had."""
        copies = []
        first = extent.file_block
        for run in runs:
            end = first + run.block_count
            part = cut(extent, first, end, self._block_size_bytes)
            try:
                await self._copy(part, run)
            except (ChecksumError, BlockLostError, DamagedError) as error:
                # As a rule the file let go of the blocks meanwhile, and somebody writes there.
                log.info("%s is not moved: %s", _names(extent), error.message)
                self._counters["move_conflicts"] += 1
                return None
            place = Location(run.region, run.block, run.generation)
            copies.append(replace(part, replicas=(place,)))
            first = end
        return tuple(copies) or None

    async def _copy(self, extent: Extent, run: Run) -> None:
        block_size = self._block_size_bytes
        source, target = extent.replicas[0], Location(run.region, run.block, run.generation)
        reading = await self._storage.transport(source.region)
        writing = await self._storage.transport(target.region)
        stored_bytes = (extent.block_count - 1) * block_size + extent.tail_stored_bytes
        step = max(block_size, PIECE_BYTES // block_size * block_size)
        for begin in range(0, stored_bytes, step):
            byte_count = min(step, stored_bytes - begin)
            await self._pace(byte_count)
            data = memoryview(
                await reading.read(source.region, source.block * block_size + begin, byte_count)
            )
            for at in range(0, byte_count, block_size):
                (checksum,) = _CHECKSUM.unpack_from(
                    extent.checksums, (begin + at) // block_size * _CHECKSUM.size
                )
                if xxh3_64_intdigest(data[at : at + block_size]) != checksum:
                    raise ChecksumError(f"block {begin // block_size} does not hold its bytes")
            offset = target.block * block_size + begin
            await writing.write(target.region, offset, target.generation, data)

    async def _put_in_place(self, copies: Sequence[_Copy]) -> None:
        for region in {run.region for copy in copies for run in copy.runs}:
            await (await self._storage.transport(region)).flush(region)
        for move, runs, extents in copies:
            request = MoveExtent(move.attributes.ino, move.extent, extents)
            try:
                await self._session.call(Opcode.MOVE_EXTENT, request)
            except (ConflictError, StaleError, InvalidError) as error:
                log.debug("%s is not moved: %s", _names(move.extent), error.message)
                self._counters["move_conflicts"] += 1
                await self._give_back(runs)
            else:
                is_up = move.tier < self._tiers[move.extent.replicas[0].region]
                byte_count = move.extent.block_count * self._block_size_bytes
                self._counters["promoted_bytes" if is_up else "demoted_bytes"] += byte_count

    async def _give_back(self, runs: Sequence[Run]) -> None:
        if runs:
            await self._session.call(Opcode.RETURN_BLOCKS, ReturnBlocks(tuple(runs)))


def _names(extent: Extent) -> str:
    place = extent.replicas[0]
    return f"blocks {place.block}+{extent.block_count} of region {place.region}"
