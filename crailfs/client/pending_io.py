"""Moves the bytes of blocks that are not committed yet.

To mapped memory of the same host they go at once. To everything else, a block that is written in
parts is collected here and sent when it is full or to be committed.
"""

from __future__ import annotations

import logging
from typing import Final, TypeAlias

from xxhash import xxh3_64, xxh3_64_intdigest

from crailfs.client.file_state import FileState, PendingBlock
from crailfs.client.storage import StorageAccess
from crailfs.client.write_behind import WriteBehind
from crailfs.errors import ChecksumError
from crailfs.records import Run
from crailfs.transports import Transport

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

_COLLECTED_BLOCKS_MAX: Final = 64
"""A file with more blocks that are neither full nor sent sends them."""


class PendingIo:
    def __init__(
        self, storage: StorageAccess, write_behind: WriteBehind, block_size_bytes: int
    ) -> None:
        self._storage = storage
        self._write_behind = write_behind
        self._block_size_bytes = block_size_bytes

    async def put_whole(self, state: FileState, run: Run, data: memoryview) -> list[PendingBlock]:
        """Fill ``run`` with ``data``, which is as long, and describe its blocks."""
        block_size = self._block_size_bytes
        await self._put(state, run, data)
        blocks = []
        for index in range(run.block_count):
            block = PendingBlock(run.region, run.block + index, run.generation, block_size)
            at = index * block_size
            block.checksum = xxh3_64_intdigest(data[at : at + block_size])
            blocks.append(block)
        return blocks

    async def begin(self, state: FileState, run: Run, content: Buffer) -> PendingBlock:
        """Start the one block of ``run`` with ``content``."""
        block = PendingBlock(run.region, run.block, run.generation, len(content))
        transport = await self._transport(run.region)
        if transport.in_place(run.region):
            await self._put(state, run, content)
            block.hasher = xxh3_64(content)
        else:
            block.buffer = bytearray(content)
            await self._collect(state, block)
        return block

    async def change(
        self, state: FileState, block: PendingBlock, inner_offset: int, data: Buffer
    ) -> None:
        """Write inside a block; what lies between its end and ``inner_offset`` becomes zeros."""
        transport = await self._transport(block.region)
        if transport.in_place(block.region) and block.buffer is None:
            # It may have been begun on another way, and still be on it.
            await self._write_behind.settle(state)
            await self._change_in_place(transport, block, inner_offset, data)
            return
        buffer = await self._load(state, block)
        block.content_changed()
        if inner_offset > len(buffer):
            buffer += bytes(inner_offset - len(buffer))
        buffer[inner_offset : inner_offset + len(data)] = data
        block.stored_bytes = len(buffer)
        await self._collect(state, block)

    async def replace(self, state: FileState, block: PendingBlock, content: Buffer) -> None:
        """Give a block a whole new content."""
        await self._write_behind.settle(state)
        state.collected.pop(block, None)
        block.buffer = None
        block.content_changed()
        await self._put(state, block.run, content)
        block.stored_bytes = len(content)
        block.checksum = xxh3_64_intdigest(content)

    async def read(self, state: FileState, block: PendingBlock) -> Buffer:
        """The stored bytes, verified where the checksum is known: it is not between a write into
        the middle of a block and the commit.

        Raises ``ChecksumError``.
        """
        if block.buffer is not None:
            return bytes(block.buffer)
        await self._write_behind.settle(state)
        transport = await self._transport(block.region)
        offset = block.block * self._block_size_bytes
        expected = block.known_checksum()
        data = await transport.read(block.region, offset, block.stored_bytes)
        if expected is not None and expected != xxh3_64_intdigest(data):
            if block.known_checksum() == expected:
                raise ChecksumError(
                    f"block {block.block} of region {block.region} does not hold what was written "
                    f"for inode {state.ino}: look at the device, and write the file again"
                )
            log.debug("inode %d was written while it was read", state.ino)
        return data

    def shorten(self, block: PendingBlock, stored_bytes: int) -> None:
        """Cut off what lies beyond ``stored_bytes``."""
        if stored_bytes < block.stored_bytes:
            block.stored_bytes = stored_bytes
            block.content_changed()
            if block.buffer is not None:
                del block.buffer[stored_bytes:]

    async def settle(self, state: FileState) -> None:
        """Wait until nothing of the file is on its way."""
        await self._write_behind.settle(state)

    async def finish(self, state: FileState) -> None:
        """Afterwards all bytes are at their servers and all checksums known.

        Raises the first error of a write that was not waited for.
        """
        for block in list(state.collected):
            await self._send(state, block)
        await self._write_behind.settle(state)
        error, state.write_error = state.write_error, None
        if error is not None:
            raise error
        for block in state.pending.values():
            if block.checksum is None:
                block.checksum = block.known_checksum()
            if block.checksum is None:
                block.checksum = xxh3_64_intdigest(await self.read(state, block))

    async def flush(self, regions: set[int]) -> None:
        """Make what was written there as durable as the media can."""
        for region in regions:
            await (await self._transport(region)).flush(region)

    async def _transport(self, region: int) -> Transport:
        return self._storage.known(region) or await self._storage.transport(region)

    async def _put(self, state: FileState, run: Run, data: Buffer) -> None:
        transport = await self._transport(run.region)
        state.unflushed_regions.add(run.region)
        if transport.in_place(run.region):
            offset = run.block * self._block_size_bytes
            await transport.write(run.region, offset, run.generation, data)
        else:
            await self._write_behind.send(state, run, transport.stage(data), transport)

    async def _change_in_place(
        self, transport: Transport, block: PendingBlock, inner_offset: int, data: Buffer
    ) -> None:
        gap_bytes = inner_offset - block.stored_bytes
        if gap_bytes > 0:
            data = bytes(gap_bytes) + bytes(data)
            inner_offset = block.stored_bytes
        hasher = block.hasher if inner_offset == block.stored_bytes else None
        block.content_changed()
        at = block.block * self._block_size_bytes + inner_offset
        await transport.write(block.region, at, block.generation, data)
        block.stored_bytes = max(block.stored_bytes, inner_offset + len(data))
        if hasher is not None:
            hasher.update(data)
            block.hasher = hasher

    async def _load(self, state: FileState, block: PendingBlock) -> bytearray:
        if block.buffer is None:
            block.buffer = bytearray(await self.read(state, block))
        return block.buffer

    async def _collect(self, state: FileState, block: PendingBlock) -> None:
        state.collected[block] = None
        if block.stored_bytes == self._block_size_bytes:
            await self._send(state, block)
        while len(state.collected) > _COLLECTED_BLOCKS_MAX:
            await self._send(state, next(iter(state.collected)))

    async def _send(self, state: FileState, block: PendingBlock) -> None:
        """Hand the block's bytes over: the buffer is not touched again."""
        state.collected.pop(block, None)
        buffer, block.buffer = block.buffer, None
        if buffer is not None:
            block.checksum = xxh3_64_intdigest(buffer)
            state.unflushed_regions.add(block.region)
            transport = await self._transport(block.region)
            await self._write_behind.send(state, block.run, buffer, transport)
