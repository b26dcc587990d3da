"""Files as streams: with a position, and several read as one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

from crailfs.client.open_file import OpenFile
from crailfs.errors import CrailError, NotFoundError, StaleError
from crailfs.records import Attributes
from crailfs.units import MIB

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

Buffer: TypeAlias = bytes | bytearray | memoryview

PIECE_BYTES: Final = 1 * MIB
"""What reading to the end asks for at once."""


class StoreFile:
    """An open file of a ``CrailStore``, with a position in bytes. Use it with ``async with``.

    Reads and writes raise what ``OpenFile`` raises: ``NoSpaceError``, ``ChecksumError``,
    ``BlockLostError``, ``FencedError``, ``UnavailableError``.
    """

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.position = 0

    @property
    def attributes(self) -> Attributes:
        return self.file.attributes

    @property
    def size(self) -> int:
        """In bytes, with what this client has written."""
        return self.file.attributes.size

    async def read(self, byte_count: int = -1) -> bytes:
        """From the position on: ``byte_count`` bytes, fewer only at the end; -1: all the rest."""
        if byte_count < 0:
            pieces = [piece async for piece in self]
            return b"".join(pieces)
        data = await self.read_at(self.position, byte_count)
        self.position += len(data)
        return data

    async def read_at(self, offset: int, byte_count: int) -> bytes:
        return bytes(await self.file.read(offset, byte_count))

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` from the position on; returns how many bytes that were."""
        target = memoryview(buffer).cast("B")
        data = await self.file.read(self.position, len(target))
        target[: len(data)] = data
        self.position += len(data)
        return len(data)

    async def write(self, data: Buffer) -> None:
        """At the position."""
        await self.write_at(self.position, data)
        self.position += memoryview(data).nbytes

    async def write_at(self, offset: int, data: Buffer) -> None:
        await self.file.write(offset, data)

    async def append(self, data: Buffer) -> int:
        """At the end of the file; returns the offset of ``data`` in it."""
        return await self.file.append(data)

    async def truncate(self, size: int) -> None:
        await self.file.truncate(size)

    async def flush(self) -> None:
        """Others see what was written."""
        await self.file.flush()

    async def sync(self) -> None:
        """And it is as durable as the file's tiers can make it."""
        await self.file.fsync()

    async def close(self) -> None:
        await self.file.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The rest of the file in pieces of up to 1 MiB."""
        while piece := await self.read(PIECE_BYTES):
            yield piece

    async def __aenter__(self) -> StoreFile:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.file.__aexit__(kind, error, traceback)


class MultifileReader:
    """The files of a multifile as one stream, in byte order of their names. Use ``async with``.

    A file that is added behind the one being read is read too; one that is removed before its turn
    is not.
    """

    def __init__(self, filesystem: FileSystem, ino: int) -> None:
        self._filesystem = filesystem
        self._ino = ino
        self._after_name = b""
        self._ended = False
        self._file: StoreFile | None = None

    async def read(self, byte_count: int = PIECE_BYTES) -> bytes:
        """Up to ``byte_count`` bytes; none only at the end of the last file."""
        while byte_count > 0:
            if self._file is None and not await self._open_next():
                break
            assert self._file is not None
            data = await self._file.read(byte_count)
            if data:
                return data
            await self.close()
        return b""

    async def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            await file.close()

    async def _open_next(self) -> bool:
        while not self._ended:
            page = await self._filesystem.read_directory(self._ino, self._after_name, 1)
            self._ended = page.complete
            if not page.entries:
                break
            self._after_name = page.entries[0].name
            try:
                ino = page.entries[0].attributes.ino
                self._file = StoreFile(await self._filesystem.open(ino))
            except (NotFoundError, StaleError):
                continue
            return True
        return False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self.read():
            yield piece

    async def __aenter__(self) -> MultifileReader:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except CrailError:
            if error is None:
                raise
