"""Reading regions whose name space is lost: their headers, and their blocks to verify them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from xxhash import xxh3_64_digest

from crailfs.errors import DamagedError, ProtocolError
from crailfs.limits import HEADER_PAGE_MAX, PAYLOAD_MAX_BYTES
from crailfs.net.client import RpcClient
from crailfs.records import BlockHeader, Extent, PlacedRegion
from crailfs.wire.messages import HeaderPage, Opcode, ReadBlocks, ReadHeaders

_CHECKSUM_BYTES: Final = 8


class LostRegion:
    """One region that holds blocks of a lost name space, through its storage server."""

    def __init__(self, placed: PlacedRegion, server: RpcClient) -> None:
        self.id = placed.id
        self.info = placed.info
        self.damaged_headers: list[int] = []
        """Blocks whose headers do not check: nothing is known of what they hold."""
        self._server = server
        self._buffer = memoryview(bytearray(PAYLOAD_MAX_BYTES))

    async def headers(self) -> AsyncIterator[BlockHeader]:
        """All headers in use, in the order of their blocks; damaged ones are passed over, noted in
        ``damaged_headers``. Raises ``UnavailableError`` and what the server answers else."""
        block = 0
        while block < self.info.block_count:
            try:
                page = await self._page(block)
            except DamagedError:
                self.damaged_headers.append(block)
                block += 1
                continue
            for header in page.headers:
                yield header
            block = page.next_block

    async def _page(self, block: int) -> HeaderPage:
        """Raises ``DamagedError`` if the header of ``block`` itself does not check."""
        page = await self._server.call(
            Opcode.READ_HEADERS, ReadHeaders(self.id, block, HEADER_PAGE_MAX)
        )
        if (
            not isinstance(page, HeaderPage)
            or not block < page.next_block <= self.info.block_count
            or not all(block <= header.block < page.next_block for header in page.headers)
        ):
            raise ProtocolError(f"the storage server of region {self.id} sent impossible headers")
        return page

    async def damaged_blocks(self, extent: Extent) -> list[int]:
        """The file blocks of ``extent`` that cannot be read as they were written. Raises what the
        server answers else, and ``UnavailableError`` if it does not."""
        blocks_at_once = PAYLOAD_MAX_BYTES // self.info.block_size_bytes
        damaged = []
        for first in range(0, extent.block_count, blocks_at_once):
            count = min(blocks_at_once, extent.block_count - first)
            try:
                await self._read(extent, first, count)
            except DamagedError:
                # One of them: which?
                indices = range(first, first + count)
                damaged += [
                    extent.file_block + index
                    for index in indices
                    if not await self._is_good(extent, index)
                ]
            else:
                damaged += [
                    extent.file_block + first + index
                    for index in range(count)
                    if not self._verifies(extent, first + index, index)
                ]
        return damaged

    async def _is_good(self, extent: Extent, index: int) -> bool:
        try:
            await self._read(extent, index, 1)
        except DamagedError:
            return False
        return self._verifies(extent, index, 0)

    async def _read(self, extent: Extent, first: int, count: int) -> None:
        """Blocks ``first`` to ``first`` + ``count`` of the extent, into the buffer's beginning."""
        size = self.info.block_size_bytes
        byte_count = (count - 1) * size + self._stored_bytes(extent, first + count - 1)
        await self._server.call(
            Opcode.READ_BLOCKS,
            ReadBlocks(self.id, (extent.replicas[0].block + first) * size, byte_count),
            into=self._buffer[:byte_count],
        )

    def _verifies(self, extent: Extent, index: int, buffer_block: int) -> bool:
        offset = buffer_block * self.info.block_size_bytes
        stored = self._buffer[offset : offset + self._stored_bytes(extent, index)]
        at = _CHECKSUM_BYTES * index
        expected = extent.checksums[at : at + _CHECKSUM_BYTES]
        return xxh3_64_digest(stored)[::-1] == expected

    def _stored_bytes(self, extent: Extent, index: int) -> int:
        is_last = index == extent.block_count - 1
        return extent.tail_stored_bytes if is_last else self.info.block_size_bytes
