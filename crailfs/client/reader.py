"""Reads: committed blocks verified one by one, this client's uncommitted ones laid over them."""

from __future__ import annotations

import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

import trio
from xxhash import xxh3_64_intdigest

from crailfs.client.block_map import FILE_BLOCKS_END, BlockMap, joined
from crailfs.client.file_state import FileState, PendingBlock
from crailfs.client.pending_io import PendingIo
from crailfs.client.session import Session
from crailfs.client.storage import StorageAccess
from crailfs.errors import (
    BlockLostError,
    ChecksumError,
    CrailError,
    TryAgainError,
    UnavailableError,
)
from crailfs.limits import FILE_SIZE_MAX_BYTES
from crailfs.records import Extent, Location
from crailfs.units import blocks_for
from crailfs.wire.messages import ExtentPage, GetExtents, Opcode

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

_FETCH_BLOCKS_MIN: Final = 1 << 10
_FETCH_BLOCKS_MAX: Final = 1 << 20
_FRESH_ATTEMPTS_MAX: Final = 64
"""How often a read starts over because the file changes under it."""


class Reader:
    def __init__(
        self,
        session: Session,
        storage: StorageAccess,
        pending_io: PendingIo,
        block_size_bytes: int,
    ) -> None:
        self._session = session
        self._storage = storage
        self._block_size_bytes = block_size_bytes
        self._pending_io = pending_io

    async def read(self, state: FileState, offset: int, byte_count: int) -> Buffer:
        """Up to ``byte_count`` bytes from ``offset``; fewer only at the end of the file.

        May be a view of mapped memory: valid until the caller awaits again.

        Raises ``ChecksumError`` or ``BlockLostError`` if no fresh map has good bytes either.
        """
        refreshed = False
        started_s = trio.current_time()
        for _ in range(_FRESH_ATTEMPTS_MAX):
            blocks = await self.blocks(state, offset, byte_count)
            attributes = state.node.attributes
            assert attributes is not None
            count = min(byte_count, max(attributes.size, state.pending_end) - offset)
            if count <= 0:
                return b""
            first = offset // self._block_size_bytes
            end = blocks_for(offset + count, self._block_size_bytes)
            pending = _pending_in(state, first, end)
            epoch = state.epoch
            try:
                data = await self._read(state, blocks, pending, offset, count)
            except (ChecksumError, BlockLostError, UnavailableError) as error:
                elapsed_s = trio.current_time() - started_s
                if refreshed or elapsed_s > self._session.operation_timeout_s / 2:
                    raise
                log.warning("inode %d: reading with a fresh map after: %s", state.ino, error)
                refreshed = True
                self._session.cache.drop_blocks(state.ino)
                continue
            if not pending or state.epoch == epoch:
                return data
        raise TryAgainError(f"inode {state.ino} changes faster than it can be read: read it again")

    async def blocks(self, state: FileState, offset: int, byte_count: int) -> BlockMap:
        """The file's map under a live lease, complete for these bytes as far as the file goes."""
        cache = self._session.cache
        block_size = self._block_size_bytes
        for _ in range(_FRESH_ATTEMPTS_MAX):
            node = state.node
            attributes = node.attributes
            first = offset // block_size
            if attributes is None or not cache.is_live(node):
                known_end = 0 if attributes is None else blocks_for(attributes.size, block_size)
                await self._fetch(state, first, max(known_end - first, _FETCH_BLOCKS_MIN))
                continue
            blocks = cache.blocks(node) or BlockMap(block_size)
            end = blocks_for(min(offset + byte_count, attributes.size), block_size)
            missing = blocks.first_unknown(first, end)
            if missing is None:
                return blocks
            first = missing[0]
            await self._fetch(state, first, blocks_for(attributes.size, block_size) - first)
        raise TryAgainError(f"inode {state.ino} changes faster than it can be read: read it again")

    async def committed(self, state: FileState, file_block: int) -> Extent | None:
        """The extent that holds the block, from a map that need not be the newest."""
        begin = file_block * self._block_size_bytes
        return (await self.blocks(state, begin, self._block_size_bytes)).at(file_block)

    async def fresh_extents(self, state: FileState, first_block: int, end_block: int) -> BlockMap:
        """What the metadata server says now, for these blocks alone."""
        blocks = BlockMap(self._block_size_bytes)
        while first_block < end_block:
            block_count = min(end_block - first_block, _FETCH_BLOCKS_MAX)
            page = await self._ask(state.ino, first_block, block_count)
            blocks.learn(first_block, page.next_block, page.extents)
            first_block = page.next_block
        return blocks

    async def pages(self, ino: int) -> AsyncIterator[ExtentPage]:
        """What the metadata server says of the whole file, which may be too much to remember."""
        first_block, end_block = 0, blocks_for(FILE_SIZE_MAX_BYTES, self._block_size_bytes)
        while first_block < end_block:
            page = await self._ask(ino, first_block, end_block - first_block)
            yield page
            first_block = page.next_block

    async def read_block(self, extent: Extent, file_block: int) -> Buffer:
        """One committed block's visible bytes, verified."""
        data = await self._read_extent(extent, file_block, file_block + 1)
        return data[: self.visible_bytes(extent, file_block)]

    def visible_bytes(self, extent: Extent, file_block: int) -> int:
        """How many of the block's bytes a reader sees; zeros follow."""
        if file_block == extent.file_block + extent.block_count - 1:
            return extent.tail_visible_bytes
        return self._block_size_bytes

    async def _ask(self, ino: int, first_block: int, block_count: int) -> ExtentPage:
        page: ExtentPage = await self._session.call(
            Opcode.GET_EXTENTS, GetExtents(ino, first_block, block_count)
        )
        if page.next_block <= first_block:
            raise CrailError(f"the metadata server's map of inode {ino} does not advance")
        return page

    async def _fetch(self, state: FileState, first_block: int, block_count: int) -> None:
        cache = self._session.cache
        ticket = cache.ticket()
        page = await self._ask(state.ino, first_block, min(block_count, _FETCH_BLOCKS_MAX))
        node = cache.store(page.attributes, ticket)
        if node is None:
            return
        blocks = cache.blocks(node)
        if blocks is None:
            blocks = BlockMap(self._block_size_bytes)
            cache.set_blocks(node, blocks)
        blocks.learn(first_block, page.next_block, page.extents)
        if page.next_block * self._block_size_bytes >= page.attributes.size:
            blocks.learn(page.next_block, FILE_BLOCKS_END, ())
        cache.count_extents(node)

    async def _read(
        self,
        state: FileState,
        blocks: BlockMap,
        pending: dict[int, PendingBlock],
        offset: int,
        byte_count: int,
    ) -> Buffer:
        block_size = self._block_size_bytes
        first = offset // block_size
        end = blocks_for(offset + byte_count, block_size)
        extents = blocks.overlapping(first, end)
        if len(extents) > 1:
            extents = joined(extents, first, end, block_size)
        if not pending and len(extents) == 1:
            extent = extents[0]
            extent_end = extent.file_block + extent.block_count
            visible_end = extent_end * block_size - block_size + extent.tail_visible_bytes
            if extent.file_block <= first and offset + byte_count <= visible_end:
                data = await self._read_extent(extent, first, end)
                begin = offset - first * block_size
                if begin == 0 and byte_count == len(data):
                    return data
                return memoryview(data)[begin : begin + byte_count]
        result = memoryview(bytearray(byte_count))
        pieces: list[Callable[[], Awaitable[None]]] = []
        for extent in extents:
            pieces += self._extent_pieces(extent, first, end, pending, offset, result)
        for file_block, block in pending.items():
            pieces.append(self._pending_piece(state, block, file_block, offset, result))
        if len(pieces) > 1 and self._storage.reads_wait:
            await _all_of(pieces)
        else:
            for piece in pieces:
                await piece()
        return result

    def _extent_pieces(
        self,
        extent: Extent,
        first: int,
        end: int,
        pending: dict[int, PendingBlock],
        offset: int,
        result: memoryview,
    ) -> list[Callable[[], Awaitable[None]]]:
        """Stretches of the extent that no pending block covers."""
        pieces = []
        begin = max(first, extent.file_block)
        stop = min(end, extent.file_block + extent.block_count)
        while begin < stop:
            if begin in pending:
                begin += 1
                continue
            piece_end = begin + 1
            while piece_end < stop and piece_end not in pending:
                piece_end += 1
            pieces.append(self._extent_piece(extent, begin, piece_end, offset, result))
            begin = piece_end
        return pieces

    def _extent_piece(
        self, extent: Extent, first: int, end: int, offset: int, result: memoryview
    ) -> Callable[[], Awaitable[None]]:
        async def read() -> None:
            data = await self._read_extent(extent, first, end)
            visible = (end - first - 1) * self._block_size_bytes
            visible += self.visible_bytes(extent, end - 1)
            _lay(result, offset, first * self._block_size_bytes, memoryview(data)[:visible])

        return read

    def _pending_piece(
        self,
        state: FileState,
        block: PendingBlock,
        file_block: int,
        offset: int,
        result: memoryview,
    ) -> Callable[[], Awaitable[None]]:
        async def read() -> None:
            stored = block.stored_bytes
            data = await self._pending_io.read(state, block)
            _lay(result, offset, file_block * self._block_size_bytes, memoryview(data)[:stored])

        return read

    async def _read_extent(self, extent: Extent, first: int, end: int) -> Buffer:
        """Stored bytes of these file blocks of the extent, each block verified; from the first
        replica that has them good."""
        failure: CrailError | None = None
        for place in extent.replicas:
            try:
                return await self._read_replica(extent, place, first, end)
            except (ChecksumError, BlockLostError, UnavailableError) as error:
                failure = error
        raise failure or BlockLostError(f"file block {first} has no replica")

    async def _read_replica(self, extent: Extent, place: Location, first: int, end: int) -> Buffer:
        block_size = self._block_size_bytes
        skipped = first - extent.file_block
        byte_count = (end - first) * block_size
        if end == extent.file_block + extent.block_count:
            byte_count -= block_size - extent.tail_stored_bytes
        transport = self._storage.known(place.region)
        if transport is None:
            transport = await self._storage.transport(place.region)
        begin = (place.block + skipped) * block_size
        try:
            data = await transport.read(place.region, begin, byte_count)
        except UnavailableError:
            await self._storage.discard(place.region, transport)
            raise
        checksums = struct.unpack_from(f"<{end - first}Q", extent.checksums, skipped * 8)
        if end - first == 1:
            good = xxh3_64_intdigest(data) == checksums[0]
        else:
            view = memoryview(data)
            good = all(
                xxh3_64_intdigest(view[at : at + block_size]) == checksum
                for at, checksum in zip(range(0, byte_count, block_size), checksums, strict=True)
            )
        if not good:
            raise ChecksumError(
                f"blocks {place.block + skipped}+{end - first} of region {place.region} do not "
                "hold what was written: look at the device, and restore the file"
            )
        return data


def _pending_in(state: FileState, first: int, end: int) -> dict[int, PendingBlock]:
    pending = state.pending
    if not pending:
        return {}
    if len(pending) < end - first:
        return {block: pending[block] for block in pending if first <= block < end}
    return {block: pending[block] for block in range(first, end) if block in pending}


def _lay(result: memoryview, offset: int, data_offset: int, data: memoryview) -> None:
    """Copy the part of ``data``, which is at ``data_offset`` of the file, that ``result``, which is
    at ``offset``, has room for."""
    begin = max(offset, data_offset)
    end = min(offset + len(result), data_offset + len(data))
    if begin < end:
        result[begin - offset : end - offset] = data[begin - data_offset : end - data_offset]


async def _all_of(pieces: list[Callable[[], Awaitable[None]]]) -> None:
    """Run all at once; the first error ends the others and is raised."""
    failures: list[CrailError] = []

    async def run(piece: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await piece()
        except CrailError as error:
            failures.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for piece in pieces:
            nursery.start_soon(run, piece, nursery.cancel_scope)
    if failures:
        raise failures[0]
