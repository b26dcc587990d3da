"""Names and attributes: the part of ``FileSystem`` that has no bytes in it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from crailfs.client.cache import ABSENT, Entry
from crailfs.client.file_state import FileState
from crailfs.client.listing import Listings
from crailfs.client.session import Session
from crailfs.client.writer import Writer
from crailfs.errors import CrailError, NotFoundError
from crailfs.records import Attributes, Durability, NodeKind, StorageClass
from crailfs.wire.messages import (
    CreateNode,
    CreateReply,
    DirectoryEntry,
    DirectoryPage,
    GetAttributes,
    GetXattr,
    LinkNode,
    ListXattr,
    Lookup,
    Opcode,
    ReadDirectory,
    ReleaseInodes,
    RemoveNode,
    RemoveReply,
    RemoveXattr,
    RenameFlag,
    RenameNode,
    RenameReply,
    SetAttributes,
    SetXattr,
    XattrFlag,
)

log = logging.getLogger(__name__)


class NameSpace:
    """What is known is answered from the cache; replies of this client's own changes keep it up to
    date without asking again."""

    block_size_bytes: int
    writer: Writer

    def __init__(self, session: Session) -> None:
        self.cache = session.cache
        self._session = session
        self._listings = Listings(session.cache)
        self._files: dict[int, FileState] = {}
        """Inodes that are open here."""
        self._said_not_open: Counter[int] = Counter()
        """Inodes in requests under way that remove them if they are not open anywhere."""
        self._removals_ended = trio.lowlevel.ParkingLot()

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
            if size is not None and state.uncertain:
                await self.writer.commit(state)
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
        blocks = None
        if known is not None and known.attributes is not None:
            resized = request.size is not None and request.size != known.attributes.size
            blocks = self.cache.blocks_before(known, attributes, data_changes=int(resized))
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
        self.cache.change_entries(parent, {name: Entry(attributes.ino)}, ticket, changed_parent)
        self.cache.store_new(attributes, ticket, self.block_size_bytes)
        return reply

    async def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """Remove an empty directory, or a name of anything else.

        A file that is open somewhere lives on until it is closed.
        """
        with self._not_opened(parent, name) as not_open:
            request = RemoveNode(parent, name, directory, not_open)
            ticket = self.cache.ticket()
            reply: RemoveReply = await self._session.call(Opcode.REMOVE_NODE, request)
        self.cache.change_entries(parent, {name: ABSENT}, ticket, reply.parent)
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
        with self._not_opened(new_parent, new_name) as not_open:
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
        old_names: dict[bytes, Entry | None] = {name: former}
        new_names: dict[bytes, Entry | None] = {new_name: Entry(moved.ino)}
        if parent == new_parent:
            self.cache.change_entries(parent, old_names | new_names, ticket, reply.new_parent)
        else:
            self.cache.change_entries(parent, old_names, ticket, reply.parent)
            self.cache.change_entries(new_parent, new_names, ticket, reply.new_parent)
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
        self.cache.change_entries(new_parent, {new_name: Entry(ino)}, ticket, changed_parent)
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

    @contextmanager
    def _not_opened(self, parent: int, name: bytes) -> Iterator[int]:
        """The inode that ``name`` is thought to be, if it is not open here: nor will it be before
        the end of the block, after which nothing that was remembered of it counts."""
        entry = self.cache.entry(parent, name)
        if entry is None or not entry.ino or entry.ino in self._files:
            yield 0
            return
        self._said_not_open[entry.ino] += 1
        try:
            yield entry.ino
        finally:
            self.cache.invalidate(entry.ino)
            self._said_not_open[entry.ino] -= 1
            if not self._said_not_open[entry.ino]:
                del self._said_not_open[entry.ino]
            self._removals_ended.unpark_all()

    async def _wait_for_removals(self, ino: int) -> None:
        """Until no request is under way that says that ``ino`` is not open here."""
        while ino in self._said_not_open:
            await self._removals_ended.park()

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
