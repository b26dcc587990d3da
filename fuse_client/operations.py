"""The FUSE protocol on one side, ``FileSystem`` on the other: translates inodes, handles, times
and errors, and decides nothing.

Permissions are checked by the kernel (``default_permissions``), which also applies the umask,
keeps flock and fcntl locks, and reads and writes through its page cache.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar

import pyfuse3
import trio
from msgspec.structs import replace
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext

from crailfs.errors import CrailError, ExistsError, NotFoundError, StaleError
from crailfs.limits import NAME_MAX_BYTES
from crailfs.records import FORMAT_BITS, Attributes, NodeKind
from crailfs.units import SHARD_SHIFT
from crailfs.wire.messages import Invalidation, RenameFlag, XattrFlag
from fuse_client.attributes import fill_entry, missing_entry
from fuse_client.directories import DirectoryReader
from fuse_client.handles import HandleTable
from fuse_client.hot_wait import InFlight
from fuse_client.invalidation import DirectoryChanges
from fuse_client.privileges import mode_without_set_id

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem
    from crailfs.client.open_file import OpenFile

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

KINDS_BY_FORMAT: Final = {
    stat.S_IFREG: NodeKind.FILE,
    stat.S_IFIFO: NodeKind.FIFO,
    stat.S_IFSOCK: NodeKind.SOCKET,
    stat.S_IFCHR: NodeKind.CHARACTER_DEVICE,
    stat.S_IFBLK: NodeKind.BLOCK_DEVICE,
}
"""What mknod(2) can make."""

RENAME_FLAGS: Final = pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE
"""Linux's numbers are those of ``RenameFlag``; RENAME_WHITEOUT is not among them."""
assert tuple(map(int, RenameFlag))[-2:] == (pyfuse3.RENAME_NOREPLACE, pyfuse3.RENAME_EXCHANGE)

XATTR_NAMESPACES: Final = (b"user.", b"trusted.")
"""Others belong to a part of the kernel whose rules (inheritance, clearing on write) would have to
be kept with them: POSIX ACLs, file capabilities, security labels."""


in_flight: Final = InFlight()
"""Of the one mount that a process serves."""


def _answers_errno(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Every way to fail becomes an errno: pyfuse3 takes nothing but ``FUSEError``."""

    @functools.wraps(handler)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        in_flight.count += 1
        try:
            return await handler(*args, **kwargs)
        except CrailError as error:
            if error.errno == errno.EIO:
                log.warning("%s: %s", handler.__name__, error.message)
            raise FUSEError(error.errno) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("%s failed in a way that is a bug", handler.__name__)
            raise FUSEError(errno.EIO) from None
        finally:
            in_flight.count -= 1

    return answer


class OpenHandle(NamedTuple):
    """One open(2): several may share the file's state in the client library."""

    file: OpenFile
    writable: bool
    keeps_set_id: bool
    """Opened by root, whose writes leave set-id bits alone."""


class Operations(pyfuse3.Operations):
    """One mount. ``changes`` is told which directories the kernel holds locked meanwhile."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, file_system: FileSystem, changes: DirectoryChanges) -> None:
        super().__init__()
        self.initialized = trio.Event()
        self._fs = file_system
        self._changing = changes.changing
        self._files: HandleTable[OpenHandle] = HandleTable()
        self._directories: HandleTable[DirectoryReader] = HandleTable()
        self._page_cache_version: dict[int, int] = {}
        """``data_version`` that the kernel's cached pages of a file belong to; like the next one
        bounded by what the kernel remembers, which says so when it forgets."""
        self._removed: dict[int, Attributes] = {}
        """Directories removed from here that a process may still be in, as they were last."""

    def init(self) -> None:
        """The kernel and libfuse have agreed: requests follow."""
        self.initialized.set()

    # --- attributes -----------------------------------------------------------------------------

    def _entry(self, attributes: Attributes, parent: int) -> EntryAttributes:
        """For a reply that shows a name of ``parent``: the kernel keeps both while leased."""
        return fill_entry(
            EntryAttributes(),
            attributes,
            block_size_bytes=self._fs.block_size_bytes,
            entry_timeout_s=self._fs.lease_remaining_ms(parent) / 1000,
            attr_timeout_s=self._fs.lease_remaining_ms(attributes.ino) / 1000,
        )

    def _attributes(self, attributes: Attributes) -> EntryAttributes:
        return fill_entry(
            EntryAttributes(),
            attributes,
            block_size_bytes=self._fs.block_size_bytes,
            entry_timeout_s=0,
            attr_timeout_s=self._fs.lease_remaining_ms(attributes.ino) / 1000,
        )

    @_answers_errno
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if len(name) > NAME_MAX_BYTES:
            raise FUSEError(errno.ENAMETOOLONG)
        try:
            attributes = await self._fs.lookup(parent, name)
        except NotFoundError:
            return missing_entry(self._fs.lease_remaining_ms(parent) / 1000)
        return self._entry(attributes, parent)

    async def forget(self, inode_list: Any) -> None:
        """Inode numbers are never reused, so there is nothing to count."""
        for ino, _ in inode_list:
            self._page_cache_version.pop(ino, None)
            self._removed.pop(ino, None)

    @_answers_errno
    async def getattr(self, ino: int, ctx: RequestContext) -> EntryAttributes:
        try:
            return self._attributes(await self._fs.attributes(ino))
        except StaleError:
            if ino not in self._removed:
                raise
            return self._attributes(self._removed[ino])

    @_answers_errno
    async def setattr(
        self,
        ino: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        mode = stat.S_IMODE(attr.st_mode) if fields.update_mode else None
        truncates = fields.update_size and ctx.uid != 0
        changes_nothing = not (
            fields.update_mode
            or fields.update_uid
            or fields.update_gid
            or fields.update_size
            or fields.update_atime
            or fields.update_mtime
        )
        if truncates or changes_nothing:
            mode = await self._mode_to_clear(ino)
        return self._attributes(
            await self._fs.set_attributes(
                ino,
                mode=mode,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                size=attr.st_size if fields.update_size else None,
                atime_ns=attr.st_atime_ns if fields.update_atime else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            )
        )

    async def _mode_to_clear(self, ino: int) -> int | None:
        """The mode without its set-id bits; ``None`` if there are none to clear.

        chown(-1, -1) arrives as a change of nothing and clears them too; one that names an owner
        clears them on the server.
        """
        attributes = await self._fs.attributes(ino)
        if FORMAT_BITS[attributes.kind] != stat.S_IFREG:
            return None
        mode = mode_without_set_id(attributes.mode)
        return mode if mode != attributes.mode else None

    @_answers_errno
    async def readlink(self, ino: int, ctx: RequestContext) -> bytes:
        return (await self._fs.attributes(ino)).target

    @_answers_errno
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        statistics = await self._fs.statistics()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = statistics.block_size_bytes
        data.f_blocks = sum(tier.total_blocks for tier in statistics.tiers)
        data.f_bfree = data.f_bavail = sum(tier.free_blocks for tier in statistics.tiers)
        inodes_left = (1 << SHARD_SHIFT) - statistics.node_count
        data.f_files = statistics.node_count + inodes_left
        data.f_ffree = data.f_favail = inodes_left
        data.f_namemax = NAME_MAX_BYTES
        return data

    # --- names ----------------------------------------------------------------------------------

    async def _create(
        self,
        parent: int,
        name: bytes,
        kind: NodeKind,
        mode: int,
        ctx: RequestContext,
        *,
        rdev: int = 0,
        target: bytes = b"",
        exclusive: bool = True,
    ) -> Attributes:
        with self._changing(parent):
            reply = await self._fs.create_node(
                parent,
                name,
                kind,
                mode=stat.S_IMODE(mode),
                uid=ctx.uid,
                gid=ctx.gid,
                rdev=rdev,
                target=target,
                exclusive=exclusive,
            )
        return reply.attributes

    @_answers_errno
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        kind = KINDS_BY_FORMAT[stat.S_IFMT(mode)]
        return self._entry(await self._create(parent, name, kind, mode, ctx, rdev=rdev), parent)

    @_answers_errno
    async def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(await self._create(parent, name, NodeKind.DIRECTORY, mode, ctx), parent)

    @_answers_errno
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(
            await self._create(parent, name, NodeKind.SYMLINK, 0o777, ctx, target=target), parent
        )

    @_answers_errno
    async def link(
        self, ino: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        with self._changing(new_parent):
            return self._entry(await self._fs.link(ino, new_parent, new_name), new_parent)

    @_answers_errno
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        with self._changing(parent):
            await self._fs.remove(parent, name, directory=False)

    @_answers_errno
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        with self._changing(parent):
            directory = await self._fs.lookup(parent, name)
            await self._fs.remove(parent, name, directory=True)
        self._removed[directory.ino] = replace(directory, nlink=0)

    @_answers_errno
    async def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        if flags & ~RENAME_FLAGS:
            raise FUSEError(errno.EINVAL)
        with self._changing(parent, new_parent):
            await self._fs.rename(parent, name, new_parent, new_name, RenameFlag(flags))

    # --- files ----------------------------------------------------------------------------------

    async def _open(self, ino: int, flags: int, ctx: RequestContext) -> FileInfo:
        truncate = bool(flags & os.O_TRUNC)
        file = await self._fs.open(ino, truncate=truncate)
        handle = OpenHandle(
            file,
            writable=flags & os.O_ACCMODE != os.O_RDONLY,
            keeps_set_id=ctx.uid == 0,
        )
        if truncate:
            await self._clear_set_id(handle)
        version = file.attributes.data_version
        fresh = self._page_cache_version.get(ino) == version
        self._page_cache_version[ino] = version
        # Who only writes needs no second copy in the page cache; the kernel drops what it replaces.
        write_only = flags & os.O_ACCMODE == os.O_WRONLY
        return FileInfo(fh=self._files.add(handle), keep_cache=fresh, direct_io=write_only)

    @_answers_errno
    async def open(self, ino: int, flags: int, ctx: RequestContext) -> FileInfo:
        return await self._open(ino, flags, ctx)

    @_answers_errno
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        exclusive = bool(flags & os.O_EXCL)
        attributes = await self._create(parent, name, NodeKind.FILE, mode, ctx, exclusive=exclusive)
        if FORMAT_BITS[attributes.kind] != stat.S_IFREG:
            raise ExistsError(f"{os.fsdecode(name)} was made meanwhile and is not a file")
        info = await self._open(attributes.ino, flags, ctx)
        return info, self._entry(self._files.get(info.fh).file.attributes, parent)

    @_answers_errno
    async def read(self, fh: int, offset: int, size: int) -> Any:
        return await self._files.get(fh).file.read(offset, size)

    @_answers_errno
    async def write(self, fh: int, offset: int, data: bytes) -> int:
        handle = self._files.get(fh)
        await handle.file.write(offset, data)
        await self._clear_set_id(handle)
        return len(data)

    async def _clear_set_id(self, handle: OpenHandle) -> None:
        attributes = handle.file.attributes
        mode = mode_without_set_id(attributes.mode)
        if mode != attributes.mode and not handle.keeps_set_id:
            await self._fs.set_attributes(attributes.ino, mode=mode)
            # exec(2) goes by the mode that the kernel remembers.
            pyfuse3.invalidate_inode(attributes.ino, attr_only=True)

    @_answers_errno
    async def flush(self, fh: int) -> None:
        """close(2): what was written is committed, late errors come out here."""
        handle = self._files.get(fh)
        if handle.writable:
            await handle.file.flush()
            self._note_own_commit(handle.file)

    @_answers_errno
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self._files.get(fh)
        await handle.file.fsync()
        self._note_own_commit(handle.file)

    @_answers_errno
    async def release(self, fh: int) -> None:
        """The last reference is gone, a mapping's too; nobody hears an error any more."""
        file = self._files.remove(fh).file
        try:
            await file.close()
        finally:
            self._note_own_commit(file)

    def _note_own_commit(self, file: OpenFile) -> None:
        """What this host wrote went through its page cache, which is as new as the commit."""
        if file.ino in self._page_cache_version:
            self._page_cache_version[file.ino] = file.attributes.data_version

    def forget_pages(self, invalidations: tuple[Invalidation, ...]) -> None:
        """Another client changed these: the next open must not keep the kernel's pages."""
        for entry in invalidations:
            if not entry.name:
                self._page_cache_version.pop(entry.ino, None)

    async def close_files(self) -> None:
        """Commits and closes whatever is still open; errors are logged, there is no caller left."""
        async with trio.open_nursery() as nursery:
            for handle in self._files:
                nursery.start_soon(self._close_abandoned, handle.file)

    async def _close_abandoned(self, file: OpenFile) -> None:
        try:
            await file.close()
        except CrailError as error:
            log.error("inode %d was open when the mount ended: %s", file.ino, error.message)

    # --- directories ----------------------------------------------------------------------------

    @_answers_errno
    async def opendir(self, ino: int, ctx: RequestContext) -> int:
        return self._directories.add(DirectoryReader(ino, self._fs))

    @_answers_errno
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        reader = self._directories.get(fh)
        entry = EntryAttributes()
        block_size_bytes = self._fs.block_size_bytes
        lease_remaining_ms = self._fs.lease_remaining_ms
        entry_timeout_s = lease_remaining_ms(reader.ino) / 1000
        while entries := await reader.entries_from(start_id):
            for listed in entries:
                fill_entry(
                    entry,
                    listed.attributes,
                    block_size_bytes=block_size_bytes,
                    entry_timeout_s=entry_timeout_s,
                    attr_timeout_s=lease_remaining_ms(listed.attributes.ino) / 1000,
                )
                start_id += 1
                if not pyfuse3.readdir_reply(token, listed.name, entry, start_id):
                    return

    @_answers_errno
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._fs.sync()

    @_answers_errno
    async def releasedir(self, fh: int) -> None:
        self._directories.remove(fh)

    # --- extended attributes --------------------------------------------------------------------

    @_answers_errno
    async def getxattr(self, ino: int, name: bytes, ctx: RequestContext) -> bytes:
        if name.startswith(b"system."):
            raise FUSEError(errno.EOPNOTSUPP)
        if not name.startswith(XATTR_NAMESPACES):
            raise FUSEError(errno.ENODATA)  # the kernel asks for capabilities before each write
        return await self._fs.get_xattr(ino, name)

    @_answers_errno
    async def setxattr(self, ino: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        if not name.startswith(XATTR_NAMESPACES):
            raise FUSEError(errno.EOPNOTSUPP)
        # pyfuse3 has already held XATTR_CREATE and XATTR_REPLACE against getxattr.
        await self._fs.set_xattr(ino, name, value, XattrFlag.NONE)

    @_answers_errno
    async def removexattr(self, ino: int, name: bytes, ctx: RequestContext) -> None:
        if not name.startswith(XATTR_NAMESPACES):
            raise FUSEError(errno.ENODATA)
        await self._fs.remove_xattr(ino, name)

    @_answers_errno
    async def listxattr(self, ino: int, ctx: RequestContext) -> list[bytes]:
        return list(await self._fs.list_xattr(ino))
