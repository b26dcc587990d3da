"""The file system by inode number: what the mount and the store are made of."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import trio

from crailfs.client.cache import ABSENT, Entry, Node, NodeCache
from crailfs.client.commit import first_batch
from crailfs.client.file_state import FileState
from crailfs.client.grants import Grants, PoolKey
from crailfs.client.listing import Listings
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
    NotFoundError,
    TooLargeError,
    UnavailableError,
)
from crailfs.records import DATA_KINDS, Attributes, Durability, NodeKind, Run, StorageClass
from crailfs.wire.messages import (
    ClusterMap,
    CreateNode,
    CreateReply,
    DirectoryEntry,
    DirectoryPage,
    GetAttributes,
    GetClusterMap,
    GetStatistics,
    GetStatus,
    GetXattr,
    Grant,
    GrantBlocks,
    Invalidation,
    LinkNode,
    ListXattr,
    Lookup,
    Opcode,
    PutKeyValue,
    ReadDirectory,
    ReleaseInodes,
    RemoveNode,
    RemoveReply,
    RemoveXattr,
    RenameFlag,
    RenameNode,
    RenameReply,
    ReturnBlocks,
    SetAttributes,
    SetXattr,
    Statistics,
    Status,
    SyncMetadata,
    XattrFlag,
)

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

_CLOSE_SECONDS: Final = 5.0
"""How long leaving ``FileSystem.connect`` goes on committing what is open."""


class FileSystem:
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
        self._files: dict[int, FileState] = {}
        self._session = Session(
            config,
            on_invalidate=self._invalidated,
            on_lost=self._session_lost,
            on_tick=self._tick,
            open_inodes=lambda: self._files,
        )
        self.cache: NodeCache = self._session.cache
        self._listings = Listings(self.cache)
        self._grants = Grants(
            self._request_blocks, self._return_blocks, nursery.start_soon, self._release_reserved
        )
        self.storage = StorageAccess(
            config, nursery, self.cluster_map, lambda: self._session.client_id
        )
        self.reader: Reader
        self.writer: Writer
        self._pending_io: PendingIo

    @classmethod
    @asynccontextmanager
    async def connect(cls, config: ClientConfig) -> AsyncIterator[FileSystem]:
        """Connect, and at the end commit and close what is still open.

        Raises ``UnavailableError`` if the metadata server does not answer within the configured
        timeout, ``AuthenticationError`` if it does not know the secret.
        """
        async with _background_nursery() as nursery:
            filesystem = cls(config, nursery)
            await nursery.start(filesystem._session.run)
            await filesystem._begin()
            try:
                yield filesystem
            finally:
                with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                    await filesystem._end()

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
        await self.storage.close()

    @property
    def client_id(self) -> int:
        return self._session.client_id

    # --- attributes -------------------------------------------------------------------------

    async def attributes(self, ino: int) -> Attributes:
        """Includes the size and times of what this client has not committed yet."""
        attributes = self.cache.attributes(ino)
        if attributes is None:
            ticket = self.cache.ticket()
            attributes = await self._session.call(Opcode.GET_ATTRIBUTES, GetAttributes(ino))
            self.cache.store(attributes, ticket)
        return self._with_pending(attributes)

    def cached_attributes(self, ino: int) -> Attributes | None:
        """Without a request: ``None`` if nothing is known under a live lease."""
        attributes = self.cache.attributes(ino)
        return None if attributes is None else self._with_pending(attributes)

    def lease_remaining_ms(self, ino: int) -> int:
        """How long what was just shown of the node may still be trusted without asking."""
        return self.cache.lease_remaining_ms(ino)

    def _with_pending(self, attributes: Attributes) -> Attributes:
        state = self._files.get(attributes.ino)
        return attributes if state is None else state.overlay(attributes)

    async def set_attributes(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Attributes:
        """Change what is not ``None``; ``size`` cuts the file or extends it with zeros."""
        request = SetAttributes(ino, mode, uid, gid, size, atime_ns, mtime_ns)
        state = self._files.get(ino)
        if state is None:
            return await self._set_attributes(request)
        async with state.exclusive():
            attributes = await self._set_attributes(request)
            if size is not None:
                await self.writer.shorten(state, size)
            if size is not None or mtime_ns is not None:
                state.mtime_ns = attributes.mtime_ns
            return state.overlay(attributes)

    async def _set_attributes(self, request: SetAttributes) -> Attributes:
        ticket = self.cache.ticket()
        attributes: Attributes = await self._session.call(Opcode.SET_ATTRIBUTES, request)
        known = self.cache.node(request.ino)
        blocks = None if known is None else self.cache.blocks(known)
        node = self.cache.store(attributes, ticket, changed=True)
        if node is not None and blocks is not None:
            if request.size is not None:
                blocks.truncate(request.size)
            self.cache.set_blocks(node, blocks)
        return attributes

    async def get_xattr(self, ino: int, name: bytes) -> bytes:
        """Raises ``NoAttributeError`` if there is none."""
        value: bytes = (await self._session.call(Opcode.GET_XATTR, GetXattr(ino, name))).value
        return value

    async def set_xattr(
        self, ino: int, name: bytes, value: bytes, flags: XattrFlag = XattrFlag.NONE
    ) -> None:
        await self._session.call(Opcode.SET_XATTR, SetXattr(ino, name, value, flags))
        self.cache.invalidate(ino)

    async def remove_xattr(self, ino: int, name: bytes) -> None:
        await self._session.call(Opcode.REMOVE_XATTR, RemoveXattr(ino, name))
        self.cache.invalidate(ino)

    async def list_xattr(self, ino: int) -> tuple[bytes, ...]:
        names: tuple[bytes, ...] = (
            await self._session.call(Opcode.LIST_XATTR, ListXattr(ino))
        ).names
        return names

    # --- names ------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """Raises ``NotFoundError``; that too is remembered while the directory's lease lasts."""
        if name in (b".", b".."):
            directory = await self.attributes(parent)
            return directory if name == b"." else await self.attributes(directory.parent)
        entry = self.cache.entry(parent, name)
        if entry is ABSENT:
            raise NotFoundError(f"directory {parent} has no entry {name!r}")
        if entry is not None:
            attributes = self.cache.attributes(entry.ino)
            if attributes is not None:
                return self._with_pending(attributes)
        ticket = self.cache.ticket()
        try:
            attributes = await self._session.call(Opcode.LOOKUP, Lookup(parent, name))
        except NotFoundError:
            self.cache.store_entry(parent, name, ABSENT, ticket)
            raise
        self.cache.store_entry(parent, name, Entry(attributes.ino), ticket)
        self.cache.store(attributes, ticket)
        return self._with_pending(attributes)

    async def create_node(
        self,
        parent: int,
        name: bytes,
        kind: NodeKind,
        *,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes = b"",
        exclusive: bool = True,
        storage_class: StorageClass | None = None,
        location: str | None = None,
        durability: Durability | None = None,
        allocation_blocks: int | None = None,
    ) -> CreateReply:
        """What is ``None`` is inherited from ``parent``.

        Raises ``ExistsError`` if the name exists and ``exclusive`` is set; otherwise an existing
        file is returned with ``created`` false.
        """
        request = CreateNode(
            parent, name, kind, mode, uid, gid, rdev, target, exclusive,
            storage_class, location, durability, allocation_blocks,
        )  # fmt: skip
        ticket = self.cache.ticket()
        reply: CreateReply = await self._session.call(Opcode.CREATE_NODE, request)
        attributes = reply.attributes
        if not reply.created:
            self.cache.store_entry(parent, name, Entry(attributes.ino), ticket)
            self.cache.store(attributes, ticket)
            return CreateReply(self._with_pending(attributes), False)
        changed_parent = self.cache.directory_after(
            parent, ticket, entries=1, subdirectories=attributes.is_directory,
            time_ns=attributes.ctime_ns,
        )  # fmt: skip
        self.cache.change_entry(parent, name, Entry(attributes.ino), ticket, changed_parent)
        self.cache.store_new(attributes, ticket, self.block_size_bytes)
        return reply

    async def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """Remove an empty directory, or a name of anything else.

        A file that is open somewhere lives on until it is closed.
        """
        request = RemoveNode(parent, name, directory, self._not_open(parent, name))
        ticket = self.cache.ticket()
        reply: RemoveReply = await self._session.call(Opcode.REMOVE_NODE, request)
        self.cache.change_entry(parent, name, ABSENT, ticket, reply.parent)
        await self._lost_name(reply.ino, reply.held, gone=reply.nlink == 0)

    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: RenameFlag = RenameFlag.NONE,
    ) -> None:
        """Replaces what ``new_name`` was, as far as POSIX allows; ``flags`` say otherwise."""
        target = self.cache.entry(new_parent, new_name)
        not_open = self._not_open(new_parent, new_name)
        request = RenameNode(parent, name, new_parent, new_name, flags, not_open)
        ticket = self.cache.ticket()
        reply: RenameReply = await self._session.call(Opcode.RENAME_NODE, request)
        moved = reply.moved
        former: Entry | None
        if flags & RenameFlag.EXCHANGE:
            former = target
            if target is not None:
                self.cache.invalidate(target.ino)
        elif moved.is_directory or moved.nlink == 1 or reply.replaced_ino:
            former = ABSENT
        else:
            # Renaming one of a file's names to another of them does nothing.
            former = None
        self.cache.change_entry(parent, name, former, ticket, reply.parent)
        self.cache.change_entry(new_parent, new_name, Entry(moved.ino), ticket, reply.new_parent)
        self.cache.store(moved, ticket, changed=True)
        if reply.replaced_ino:
            await self._lost_name(reply.replaced_ino, reply.replaced_held, gone=False)

    async def link(self, ino: int, new_parent: int, new_name: bytes) -> Attributes:
        """A further name for anything but a directory."""
        ticket = self.cache.ticket()
        request = LinkNode(ino, new_parent, new_name)
        attributes: Attributes = await self._session.call(Opcode.LINK_NODE, request)
        changed_parent = self.cache.directory_after(
            new_parent, ticket, entries=1, subdirectories=0, time_ns=attributes.ctime_ns
        )
        self.cache.change_entry(new_parent, new_name, Entry(ino), ticket, changed_parent)
        self.cache.store(attributes, ticket, changed=True)
        return self._with_pending(attributes)

    async def read_directory(
        self, ino: int, after_name: bytes = b"", entry_limit: int = 1024
    ) -> DirectoryPage:
        """Up to ``entry_limit`` entries that come after ``after_name`` in byte order."""
        ticket = self.cache.ticket()
        request = ReadDirectory(ino, after_name, entry_limit)
        page: DirectoryPage = await self._session.call(Opcode.READ_DIRECTORY, request)
        self._listings.learn(ino, after_name, page, ticket)
        if not self._files:
            return page
        return DirectoryPage(
            tuple(
                DirectoryEntry(entry.name, self._with_pending(entry.attributes))
                for entry in page.entries
            ),
            page.complete,
        )

    def _not_open(self, parent: int, name: bytes) -> int:
        """The inode that ``name`` is thought to be, if it is not open here."""
        entry = self.cache.entry(parent, name)
        return 0 if entry is None or entry.ino in self._files else entry.ino

    async def _lost_name(self, ino: int, held: bool, *, gone: bool) -> None:
        self.cache.invalidate(ino)
        state = self._files.get(ino)
        if held and state is not None:
            state.held = True
        elif held:
            await self._release_inodes((ino,))
        elif gone and state is None:
            self.cache.forget(ino)

    async def _release_inodes(self, inodes: tuple[int, ...]) -> None:
        try:
            await self._session.call(Opcode.RELEASE_INODES, ReleaseInodes(inodes))
        except CrailError as error:
            # They go with the session at the latest.
            log.warning("releasing unlinked inodes %s: %s", inodes, error)

    # --- data -------------------------------------------------------------------------------

    async def open(self, ino: int, *, truncate: bool = False) -> OpenFile:
        """What other clients committed before this is seen by reads of the handle.

        Raises ``StaleError`` if the node is gone, ``InvalidError`` if it holds no data.
        """
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
            placement = attributes.placement
            state.pool_key = (placement.storage_class, placement.location)
            state.allocation_blocks = placement.allocation_blocks
            state.durability = placement.durability
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
        placement = (await self.attributes(table)).placement
        state = FileState(Node(0), self.block_size_bytes)
        state.pool_key = (placement.storage_class, placement.location)
        state.allocation_blocks = placement.allocation_blocks
        await self.writer.write_fresh(state, value)
        try:
            await self._pending_io.finish(state)
            batch = first_batch(state.pending, self.block_size_bytes)
            if len(batch.file_blocks) < len(state.pending):
                raise TooLargeError(
                    f"a value of {len(value)} bytes is too large for one commit: write a file"
                )
            request = PutKeyValue(table, key, mode, uid, gid, len(value), batch.extents)
            ticket = self.cache.ticket()
            attributes: Attributes = await self._session.call(Opcode.PUT_KEY_VALUE, request)
        except CrailError as error:
            if not isinstance(error, UnavailableError):
                self.writer.discard(state)
            raise
        finally:
            self.writer.release_reserved(state)
        entry = Entry(attributes.ino)
        self.cache.change_entry(table, key, entry, ticket, None)
        self.cache.drop_blocks(attributes.ino)
        self.cache.store(attributes, ticket, changed=True)
        return attributes

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


@asynccontextmanager
async def _background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for background tasks, which live until the body has ended, even if the body is
    cancelled: what is open is committed through them. What is raised comes out as it is, not in a
    group."""

    async def hold(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as background:
                task_status.started(background)
                await trio.sleep_forever()

    try:
        async with trio.open_nursery() as nursery:
            background = await nursery.start(hold)
            try:
                yield background
            finally:
                background.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raised: BaseException = group
        while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
            raised = raised.exceptions[0]
        if raised is group:
            raise
        raise raised from None
