"""The file system by inode number: what the mount and the store are made of."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import trio

from crailfs.client.background import background_nursery
from crailfs.client.cache import Entry, Node
from crailfs.client.file_state import FileState
from crailfs.client.grants import Grants, PoolKey
from crailfs.client.namespace import NameSpace
from crailfs.client.open_file import OpenFile
from crailfs.client.pending_io import PendingIo
from crailfs.client.reader import Reader
from crailfs.client.session import Session
from crailfs.client.storage import StorageAccess
from crailfs.client.write_behind import WriteBehind
from crailfs.client.writer import Writer
from crailfs.config import ClientConfig
from crailfs.errors import (
    CrailError,
    FencedError,
    InvalidError,
    IsADirectoryCrailError,
    UnavailableError,
)
from crailfs.records import DATA_KINDS, Attributes, Extent, Run
from crailfs.wire.messages import (
    ClusterMap,
    GetClusterMap,
    GetStatistics,
    GetStatus,
    Grant,
    GrantBlocks,
    Invalidation,
    Opcode,
    PutKeyValue,
    ReturnBlocks,
    Statistics,
    Status,
    SyncMetadata,
)

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

_USED_MAX: Final = 4_096
_CLOSE_SECONDS: Final = 5.0
"""How long leaving ``FileSystem.connect`` goes on committing what is open."""


class FileSystem(NameSpace):
    """One client's view: names, attributes and open files. Errors are those of ``crailfs.errors``.

    All methods raise ``UnavailableError`` if no server answers within the configured timeout.
    """

    def __init__(self, config: ClientConfig, nursery: trio.Nursery) -> None:
        """Use ``FileSystem.connect``."""
        self.on_invalidate: Callable[[tuple[Invalidation, ...]], Awaitable[None]] | None = None
        """Awaited before the metadata server hears that this client has dropped what changed."""
        self.nursery = nursery
        self.block_size_bytes = 0
        self._config = config
        self._host = config.host or socket.gethostname()
        session = Session(
            config,
            on_invalidate=self._invalidated,
            on_lost=self._session_lost,
            on_tick=self._tick,
            open_inodes=self._take_used_inodes,
        )
        super().__init__(session)
        self._used: set[int] = set()
        """Files that were closed since the metadata server was last told what is in use."""
        self._grants = Grants(
            self._request_blocks, self._return_blocks, nursery.start_soon, self._release_reserved
        )
        self.storage = StorageAccess(
            config, nursery, self.cluster_map, lambda: self._session.client_id
        )
        self.reader: Reader
        self._pending_io: PendingIo

    @classmethod
    @asynccontextmanager
    async def connect(cls, config: ClientConfig) -> AsyncIterator[FileSystem]:
        """Connect, and at the end commit and close what is still open.

        Raises ``UnavailableError`` if the metadata server does not answer within the configured
        timeout, ``AuthenticationError`` if it does not know the secret.
        """
        async with background_nursery() as nursery:
            filesystem = cls(config, nursery)
            await nursery.start(filesystem._session.run)
            await filesystem._begin()
            try:
                yield filesystem
            finally:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    try:
                        await filesystem._end()
                    finally:
                        await filesystem.storage.close()
                    await filesystem._session.end()

    async def _begin(self) -> None:
        block_size = self.block_size_bytes = (await self.cluster_map()).block_size_bytes
        write_behind = WriteBehind(self.nursery, self.storage, block_size)
        self._pending_io = PendingIo(self.storage, write_behind, block_size)
        self.reader = Reader(self._session, self.storage, self._pending_io, block_size)
        self.writer = Writer(
            self._session, self.storage, self._grants, self.reader, self._pending_io, block_size
        )

    async def _end(self) -> None:
        for state in list(self._files.values()):
            try:
                async with state.exclusive():
                    await self.writer.commit(state)
            except CrailError as error:
                log.error("inode %d: what was written last is lost: %s", state.ino, error)
            self.writer.release_reserved(state)
        held = tuple(ino for ino, state in self._files.items() if state.held)
        if held:
            await self._release_inodes(held)
        await self._grants.drain()

    @property
    def client_id(self) -> int:
        return self._session.client_id

    # --- data -------------------------------------------------------------------------------

    async def open(self, ino: int, *, truncate: bool = False) -> OpenFile:
        """What other clients committed before this is seen by reads of the handle.

        Raises ``StaleError`` if the node is gone, ``InvalidError`` if it holds no data.
        """
        if self._said_not_open:
            await self._wait_for_removals(ino)
        state = self._files.get(ino)
        if state is None:
            state = self._files[ino] = FileState(self.cache.pin(ino), self.block_size_bytes)
        state.handles += 1
        try:
            if truncate:
                attributes = await self.set_attributes(ino, size=0)
            else:
                attributes = await self.attributes(ino)
            _check_holds_data(attributes)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.release_handle(state)
            raise
        if state.known is None:
            state.place(attributes)
        state.known = attributes
        return OpenFile(self, state)

    async def release_handle(self, state: FileState) -> None:
        """A handle was closed: with the last one the file is no longer open here."""
        state.handles -= 1
        if state.handles:
            return
        self.writer.release_reserved(state)
        state.forget_pending()
        del self._files[state.ino]
        if len(self._used) < _USED_MAX:
            self._used.add(state.ino)
        self.cache.unpin(state.node)
        if state.held:
            self.cache.forget(state.ino)
            await self._release_inodes((state.ino,))

    async def put_key_value(
        self, table: int, key: bytes, value: Buffer, *, mode: int, uid: int, gid: int
    ) -> Attributes:
        """Create or replace a key-value as a whole: a reader sees the old or the new one.

        Raises ``TooLargeError`` for more than one commit can carry.
        """
        state = FileState(Node(0), self.block_size_bytes)
        state.place(await self.attributes(table))
        extents = await self.writer.write_value(state, value)
        request = PutKeyValue(table, key, mode, uid, gid, len(value), extents)
        ticket = self.cache.ticket()
        try:
            attributes: Attributes = await self._session.call(Opcode.PUT_KEY_VALUE, request)
        except CrailError as error:
            if not isinstance(error, (UnavailableError, FencedError)):
                self.writer.discard(state)
            raise
        entry = Entry(attributes.ino)
        self.cache.change_entries(table, {key: entry}, ticket, None)
        self.cache.drop_blocks(attributes.ino)
        self.cache.store(attributes, ticket, changed=True)
        return attributes

    async def extents(self, ino: int) -> list[Extent]:
        """Where all of a file lies now, in order; what is in none of them is a hole.

        Raises ``InvalidError`` if the node holds no data.
        """
        return [extent async for page in self.reader.pages(ino) for extent in page.extents]

    def _take_used_inodes(self) -> list[int]:
        """What is open, and what was open since the last call."""
        used, self._used = self._used, set()
        return [*self._files, *(ino for ino in used if ino not in self._files)]

    # --- the cluster ------------------------------------------------------------------------

    async def cluster_map(self) -> ClusterMap:
        reply: ClusterMap = await self._session.call(Opcode.GET_CLUSTER_MAP, GetClusterMap())
        return reply

    async def statistics(self) -> Statistics:
        reply: Statistics = await self._session.call(Opcode.GET_STATISTICS, GetStatistics())
        return reply

    async def sync(self) -> None:
        """Returns when every change of the name space acknowledged so far outlives a power cut."""
        await self._session.call(Opcode.SYNC_METADATA, SyncMetadata())

    async def status(self) -> Status:
        reply: Status = await self._session.call(Opcode.GET_STATUS, GetStatus())
        return reply

    async def _request_blocks(
        self, key: PoolKey, block_count: int, contiguous_blocks: int
    ) -> tuple[Run, ...]:
        storage_class, location = key
        request = GrantBlocks(storage_class, location, self._host, block_count, contiguous_blocks)
        reply: Grant = await self._session.call(Opcode.GRANT_BLOCKS, request)
        return reply.runs

    async def _return_blocks(self, runs: list[Run]) -> None:
        await self._session.call(Opcode.RETURN_BLOCKS, ReturnBlocks(tuple(runs)))

    def _release_reserved(self) -> None:
        for state in self._files.values():
            self.writer.release_reserved(state)

    async def _tick(self) -> None:
        await self._grants.tick()

    # --- what the metadata server tells -----------------------------------------------------

    async def _invalidated(self, entries: tuple[Invalidation, ...]) -> tuple[int, ...]:
        for entry in entries:
            self.cache.invalidate(entry.ino, entry.name)
        if self.on_invalidate is not None:
            try:
                await self.on_invalidate(entries)
            except CrailError as error:
                log.error("dropping what the kernel cached: %s", error)
        still_open = []
        for entry in entries:
            state = self._files.get(entry.ino)
            if entry.removed and state is not None:
                state.held = True
                still_open.append(entry.ino)
        return tuple(still_open)

    def _session_lost(self) -> None:
        self._grants.lose()
        self.storage.reset()
        for state in self._files.values():
            state.lose(
                FencedError(
                    f"inode {state.ino}: the session ended (this client was silent for too long);"
                    " what was not committed is lost: write it again"
                )
            )


def _check_holds_data(attributes: Attributes) -> None:
    if attributes.is_directory:
        raise IsADirectoryCrailError(f"inode {attributes.ino} is a directory, not a file")
    if attributes.kind not in DATA_KINDS:
        raise InvalidError(
            f"inode {attributes.ino} is a {attributes.kind.name.lower()}: it holds no data"
        )
