"""A handle on a file's data."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from crailfs.client.file_state import FileState
from crailfs.client.read_ahead import ReadAhead
from crailfs.errors import CrailError, InvalidError
from crailfs.records import Attributes, Durability

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

Buffer: TypeAlias = bytes | bytearray | memoryview


class OpenFile:
    """Made by ``FileSystem.open``. All handles of one file at one client see each other's writes at
    once; other clients see them after ``flush``, ``fsync`` or ``close``.

    After ``FencedError`` (the session ended) what was not committed is lost, and the handle goes on
    with what was.
    """

    def __init__(self, filesystem: FileSystem, state: FileState) -> None:
        self.ino = state.ino
        self._filesystem = filesystem
        self._state = state
        self._is_open = True
        self._read_ahead = ReadAhead(
            filesystem.reader, filesystem.cache, filesystem.storage, state, filesystem.nursery
        )

    @property
    def attributes(self) -> Attributes:
        """As last heard of, with this client's uncommitted size and times."""
        return self._state.current_attributes()

    async def read(self, offset: int, byte_count: int) -> Buffer:
        """Up to ``byte_count`` bytes from byte ``offset`` on, fewer only at the end of the file.

        May be a view of mapped memory: use it before awaiting again, or copy it.

        Raises ``ChecksumError`` or ``BlockLostError`` if the bytes cannot be had as written.
        """
        self._check(offset, byte_count)
        if self._filesystem.storage.reads_wait:
            return await self._read_ahead.read(offset, byte_count)
        return await self._filesystem.reader.read(self._state, offset, byte_count)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data`` at byte ``offset``; zeros fill what lies between the file's end and
        there.

        Raises ``NoSpaceError`` when every tier of the file's class is full: part of ``data`` may be
        written then, and the file stays usable.
        """
        self._check(offset, 0)
        state = self._state
        await state.acquire()
        try:
            state.raise_failure()
            await self._filesystem.writer.write(state, offset, data)
        finally:
            state.release()

    async def append(self, data: Buffer) -> int:
        """Write ``data`` at the end of the file as this client knows it; returns where that was."""
        self._check(0, 0)
        state = self._state
        async with state.exclusive():
            state.raise_failure()
            offset = (await self._filesystem.attributes(self.ino)).size
            await self._filesystem.writer.write(state, offset, data)
        return offset

    async def truncate(self, size: int) -> None:
        """Cut the file, or extend it with zeros, to ``size`` bytes."""
        self._check(0, 0)
        await self._filesystem.set_attributes(self.ino, size=size)

    async def flush(self) -> None:
        """Commit: others see what was written. Late errors of earlier writes are raised here.

        Durable as well, like ``fsync``, if the file's class asks for it at each close.
        """
        self._check(0, 0)
        await self._flush()

    async def fsync(self) -> None:
        """Commit, durably as far as the file's tiers can."""
        self._check(0, 0)
        state = self._state
        async with state.exclusive():
            state.raise_failure()
            await self._filesystem.writer.sync(state)

    async def close(self) -> None:
        """Flush, and give the handle up, even if the flush raises. Again: does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            await self._flush()
        finally:
            await self._filesystem.release_handle(self._state)

    async def __aenter__(self) -> OpenFile:
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

    async def _flush(self) -> None:
        state = self._state
        if not state.pending and state.failure is None and state.write_error is None:
            return
        async with state.exclusive():
            state.raise_failure()
            if state.durability is Durability.CLOSE:
                await self._filesystem.writer.sync(state)
            else:
                await self._filesystem.writer.commit(state)

    def _check(self, offset: int, byte_count: int) -> None:
        if not self._is_open:
            raise InvalidError(f"this handle of inode {self.ino} is closed: open the file again")
        if offset < 0 or byte_count < 0:
            raise InvalidError(f"{byte_count} bytes at {offset}: neither can be negative")
        self._state.raise_failure()
