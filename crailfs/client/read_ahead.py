"""Reads ahead of a sequential reader where a device or a network is to be waited for."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, TypeAlias

import trio

from crailfs.client.cache import NodeCache
from crailfs.client.file_state import FileState
from crailfs.client.reader import Reader
from crailfs.client.storage import StorageAccess
from crailfs.errors import CrailError
from crailfs.limits import CLIENT_READ_AHEAD_MAX_BYTES
from crailfs.units import MIB

Buffer: TypeAlias = bytes | bytearray | memoryview
Version: TypeAlias = tuple[int, int]

CHUNK_BYTES: Final = 1 * MIB
_CHUNKS_MAX: Final = CLIENT_READ_AHEAD_MAX_BYTES // CHUNK_BYTES
_CHUNKS_AHEAD: Final = _CHUNKS_MAX // 2
_BY_ITSELF_BYTES: Final = _CHUNKS_AHEAD * CHUNK_BYTES
"""A read of so much keeps the way to its bytes busy by itself, and wants no copy of them."""
_SEQUENTIAL_READS_MIN: Final = 2
"""So many reads in a row that follow each other make a sequential reader."""


class _Chunk:
    def __init__(self, version: Version) -> None:
        self.version = version
        self.ready = trio.Event()
        self.data: Buffer | None = None


class ReadAhead:
    """Of one handle. Reads may come a little out of order, as a kernel sends them."""

    def __init__(
        self,
        reader: Reader,
        cache: NodeCache,
        storage: StorageAccess,
        state: FileState,
        nursery: trio.Nursery,
    ) -> None:
        self._reader = reader
        self._cache = cache
        self._storage = storage
        self._state = state
        self._nursery = nursery
        self._chunks: OrderedDict[int, _Chunk] = OrderedDict()
        self._next_offset = 0
        self._in_a_row = 0

    async def read(self, offset: int, byte_count: int) -> Buffer:
        """As ``Reader.read``."""
        near = abs(offset - self._next_offset) <= CHUNK_BYTES
        self._in_a_row = self._in_a_row + 1 if near else 0
        self._next_offset = offset + byte_count
        if self._in_a_row < _SEQUENTIAL_READS_MIN or byte_count >= _BY_ITSELF_BYTES:
            return await self._reader.read(self._state, offset, byte_count)
        await self._reader.blocks(self._state, offset, byte_count)
        version = self._version()
        attributes = self._state.node.attributes
        assert version is not None and attributes is not None
        size = max(attributes.size, self._state.pending_end)
        byte_count = max(0, min(byte_count, size - offset))
        if byte_count == 0:
            return b""
        first = offset // CHUNK_BYTES
        end = (offset + byte_count - 1) // CHUNK_BYTES + 1
        for index in range(first, min(end + _CHUNKS_AHEAD, -(-size // CHUNK_BYTES))):
            self._start(index, version)
        if end - first == 1:
            data = await self._chunk(first, version)
            begin = offset - first * CHUNK_BYTES
            if data is not None and len(data) >= begin + byte_count:
                return memoryview(data)[begin : begin + byte_count]
        return await self._gather(offset, byte_count, first, end, version)

    def _version(self) -> Version | None:
        """Of what a reader here sees; ``None``: not known under a live lease."""
        node = self._state.node
        if node.attributes is None or not self._cache.is_live(node):
            return None
        return node.attributes.data_version, self._state.writes

    def _start(self, index: int, version: Version) -> None:
        known = self._chunks.get(index)
        if known is not None and known.version == version:
            self._chunks.move_to_end(index)
            return
        self._chunks.pop(index, None)
        while len(self._chunks) >= _CHUNKS_MAX:
            self._chunks.popitem(last=False)
        chunk = self._chunks[index] = _Chunk(version)
        self._nursery.start_soon(self._fetch, index, chunk)

    async def _fetch(self, index: int, chunk: _Chunk) -> None:
        try:
            data = await self._reader.read(self._state, index * CHUNK_BYTES, CHUNK_BYTES)
            if self._version() == chunk.version:
                passing = self._storage.reads_are_views and isinstance(data, memoryview)
                chunk.data = bytes(data) if passing else data
        except CrailError:
            chunk.data = None  # whoever wants these bytes reads them again and meets the error
        finally:
            chunk.ready.set()

    async def _chunk(self, index: int, version: Version) -> Buffer | None:
        """``None``: not to be had, or of another version."""
        chunk = self._chunks.get(index)
        if chunk is None:
            return None
        await chunk.ready.wait()
        if chunk.data is None or chunk.version != version:
            self._chunks.pop(index, None)
            return None
        return chunk.data

    async def _gather(
        self, offset: int, byte_count: int, first: int, end: int, version: Version
    ) -> Buffer:
        result = bytearray()
        for index in range(first, end):
            chunk_offset = index * CHUNK_BYTES
            begin = max(offset, chunk_offset) - chunk_offset
            wanted = min(offset + byte_count, chunk_offset + CHUNK_BYTES) - chunk_offset - begin
            data = await self._chunk(index, version)
            if data is None or len(data) < begin + wanted:
                return await self._reader.read(self._state, offset, byte_count)
            result += memoryview(data)[begin : begin + wanted]
        return result
