"""The public API for trio: files, directories, multifiles and key-values by path."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, TypeAlias

import trio

from crailfs.client.filesystem import FileSystem
from crailfs.client.stream import MultifileReader, StoreFile
from crailfs.config import ClientConfig
from crailfs.errors import (
    CrailError,
    ExistsError,
    InvalidError,
    NameTooLongError,
    NotADirectoryCrailError,
    NotFoundError,
    StaleError,
)
from crailfs.limits import FILE_SIZE_MAX_BYTES, PATH_MAX_BYTES
from crailfs.records import Attributes, Durability, NodeKind, StorageClass
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import RenameFlag, Statistics

Buffer: TypeAlias = bytes | bytearray | memoryview
Path: TypeAlias = str | bytes | os.PathLike[str]
Parts: TypeAlias = list[bytes]
Names: TypeAlias = list[str]

_SYMLINKS_MAX: Final = 40
_REMOVALS_AT_ONCE_MAX: Final = 32


class Entry(NamedTuple):
    name: str
    attributes: Attributes


class CrailStore:
    """A CrailFS by path. Paths begin at the root, with or without a leading slash.

    Every method raises errors of ``crailfs.errors``: ``NotFoundError`` and the like as the system
    calls do, ``UnavailableError`` if no server answers within the configured timeout.
    """

    def __init__(self, filesystem: FileSystem, *, uid: int | None = None, gid: int | None = None):
        """``uid`` and ``gid`` own what is created; ``None``: this process's."""
        self.filesystem = filesystem
        self._uid = os.getuid() if uid is None else uid
        self._gid = os.getgid() if gid is None else gid

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, config: ClientConfig, *, uid: int | None = None, gid: int | None = None
    ) -> AsyncIterator[CrailStore]:
        """Use with ``async with``: at its end what is still open is committed and closed."""
        async with FileSystem.connect(config) as filesystem:
            yield cls(filesystem, uid=uid, gid=gid)

    # --- names ------------------------------------------------------------------------------

    async def lookup(self, path: Path, *, follow: bool = True) -> Attributes:
        """A node's attributes; of a symlink itself if not ``follow``. ``NotFoundError``."""
        return await self._resolve(ROOT_INODE, _parts(path), follow)

    async def exists(self, path: Path) -> bool:
        try:
            await self.lookup(path)
        except (NotFoundError, NotADirectoryCrailError):
            return False
        return True

    async def scan(self, path: Path) -> AsyncIterator[Entry]:
        """The entries of a directory in byte order of their names, read page by page."""
        ino = (await self.lookup(path)).ino
        after_name = b""
        while True:
            page = await self.filesystem.read_directory(ino, after_name)
            for entry in page.entries:
                yield Entry(os.fsdecode(entry.name), entry.attributes)
            if page.complete or not page.entries:
                return
            after_name = page.entries[-1].name

    async def list(self, path: Path) -> list[Entry]:
        """All entries of a directory at once, in byte order of their names."""
        return [entry async for entry in self.scan(path)]

    async def mkdir(
        self,
        path: Path,
        *,
        kind: NodeKind = NodeKind.DIRECTORY,
        mode: int = 0o755,
        parents: bool = False,
        exist_ok: bool = False,
        storage_class: StorageClass | None = None,
        location: str | None = None,
    ) -> Attributes:
        """Make a directory, or a container (``MULTIFILE``, ``TABLE``).

        ``parents``: make missing directories above it too. What is created in it inherits storage
        class and location, which come from the directory above if they are ``None``.
        """
        parts = _parts(path)
        if not parts:
            raise ExistsError("the root directory exists")
        parent = await (self._make_parents(parts[:-1]) if parents else self._parent(parts))
        reply = await self.filesystem.create_node(
            parent,
            parts[-1],
            kind,
            mode=mode,
            uid=self._uid,
            gid=self._gid,
            exclusive=not exist_ok,
            storage_class=storage_class,
            location=location,
        )
        return reply.attributes

    async def rename(self, path: Path, new_path: Path, *, replace: bool = True) -> None:
        """``ExistsError`` if ``new_path`` exists and is not to be replaced."""
        parts, new_parts = _parts(path), _parts(new_path)
        await self.filesystem.rename(
            await self._parent(parts),
            parts[-1],
            await self._parent(new_parts),
            new_parts[-1],
            RenameFlag.NONE if replace else RenameFlag.NO_REPLACE,
        )

    async def symlink(self, path: Path, target: Path) -> None:
        parts = _parts(path)
        await self.filesystem.create_node(
            await self._parent(parts),
            parts[-1],
            NodeKind.SYMLINK,
            mode=0o777,
            uid=self._uid,
            gid=self._gid,
            target=os.fsencode(target),
        )

    async def delete(self, path: Path, *, recursive: bool = False) -> None:
        """Remove a node; with ``recursive`` a directory with all that is in it, else
        ``NotEmptyError``."""
        parts = _parts(path)
        parent = await self._parent(parts)
        attributes = await self.filesystem.lookup(parent, parts[-1])
        if recursive and attributes.is_directory:
            await self._empty(attributes.ino)
        await self.filesystem.remove(parent, parts[-1], directory=attributes.is_directory)

    async def _empty(self, top: int) -> None:
        """Remove everything below ``top``; without recursion, since paths may be long."""
        levels: list[tuple[int, int, bytes]] = [(top, 0, b"")]
        while levels:
            ino, parent, name = levels[-1]
            page = await self.filesystem.read_directory(ino)
            directories = [entry for entry in page.entries if entry.attributes.is_directory]
            others = [entry.name for entry in page.entries if not entry.attributes.is_directory]
            await _at_once([functools.partial(self._remove, ino, name, False) for name in others])
            if directories:
                levels += [(entry.attributes.ino, ino, entry.name) for entry in directories]
            elif page.complete:
                levels.pop()
                if parent:
                    await self._remove(parent, name, True)

    async def _remove(self, parent: int, name: bytes, directory: bool) -> None:
        try:
            await self.filesystem.remove(parent, name, directory=directory)
        except (NotFoundError, StaleError):
            return  # somebody else was faster

    # --- files ------------------------------------------------------------------------------

    async def create(
        self,
        path: Path,
        *,
        mode: int = 0o644,
        exclusive: bool = False,
        storage_class: StorageClass | None = None,
        location: str | None = None,
        durability: Durability | None = None,
    ) -> StoreFile:
        """Open a new file for writing. An existing one is emptied, or ``ExistsError`` if
        ``exclusive``. What is ``None`` is inherited from the directory."""
        parts = _parts(path)
        reply = await self.filesystem.create_node(
            await self._parent(parts),
            parts[-1],
            NodeKind.FILE,
            mode=mode,
            uid=self._uid,
            gid=self._gid,
            exclusive=exclusive,
            storage_class=storage_class,
            location=location,
            durability=durability,
        )
        attributes = reply.attributes
        if attributes.kind is NodeKind.SYMLINK:
            attributes = await self.lookup(path)
        empty = reply.created or attributes.size == 0
        return StoreFile(await self.filesystem.open(attributes.ino, truncate=not empty))

    async def open(self, path: Path) -> StoreFile:
        """Open an existing file for reading and writing, at position 0."""
        return StoreFile(await self.filesystem.open((await self.lookup(path)).ino))

    async def read(self, path: Path, offset: int = 0, byte_count: int = -1) -> bytes:
        """Bytes of a file from ``offset`` on; -1: all of them."""
        async with await self.open(path) as file:
            file.position = offset
            return await file.read(byte_count)

    async def write(self, path: Path, data: Buffer) -> None:
        """Make ``data`` the content of a file, which is created if it does not exist."""
        async with await self.create(path) as file:
            await file.write(data)

    # --- containers -------------------------------------------------------------------------

    async def open_multifile(self, path: Path) -> MultifileReader:
        """The files of a multifile (or of any directory) as one stream, in name order."""
        attributes = await self.lookup(path)
        if not attributes.is_directory:
            raise NotADirectoryCrailError(f"{os.fsdecode(path)} is not a multifile")
        return MultifileReader(self.filesystem, attributes.ino)

    async def put(self, table: Path, key: str | bytes, value: Buffer, *, mode: int = 0o644) -> None:
        """Set a key of a table; the last put wins, and a reader sees one value as a whole."""
        ino = (await self.lookup(table)).ino
        await self.filesystem.put_key_value(
            ino, os.fsencode(key), value, mode=mode, uid=self._uid, gid=self._gid
        )

    async def get(self, table: Path, key: str | bytes) -> bytes:
        """Raises ``NotFoundError`` if the table has no such key."""
        ino = (await self.lookup(table)).ino
        attributes = await self.filesystem.lookup(ino, os.fsencode(key))
        async with await self.filesystem.open(attributes.ino) as file:
            # One read: it is of one version of the map.
            return bytes(await file.read(0, FILE_SIZE_MAX_BYTES))

    async def delete_key(self, table: Path, key: str | bytes) -> None:
        ino = (await self.lookup(table)).ino
        await self.filesystem.remove(ino, os.fsencode(key), directory=False)

    async def keys(self, table: Path) -> Names:
        """In byte order; each once."""
        return [entry.name async for entry in self.scan(table)]

    # --- placement and space ----------------------------------------------------------------

    async def set_class(self, path: Path, storage_class: StorageClass | str) -> None:
        """Which tiers hold what is written from now on; a directory's is inherited by what is
        created in it. Raises ``InvalidError`` for text that names no tiers."""
        chosen = (
            StorageClass.parse(storage_class) if isinstance(storage_class, str) else storage_class
        )
        ino = (await self.lookup(path)).ino
        await self.filesystem.set_xattr(ino, b"user.crail.storage_class", str(chosen).encode())

    async def get_class(self, path: Path) -> StorageClass:
        return (await self.lookup(path)).placement.storage_class

    async def statistics(self) -> Statistics:
        """Nodes, and blocks by tier."""
        return await self.filesystem.statistics()

    # --- paths ------------------------------------------------------------------------------

    async def _parent(self, parts: Parts) -> int:
        if not parts:
            raise InvalidError("the root directory can be neither made, moved nor removed")
        return (await self._resolve(ROOT_INODE, parts[:-1], True)).ino

    async def _make_parents(self, parts: Parts) -> int:
        ino: int = ROOT_INODE
        for index, name in enumerate(parts):
            try:
                ino = (await self._resolve(ino, [name], True)).ino
            except NotFoundError:
                directory = b"/".join(parts[: index + 1])
                ino = (await self.mkdir(directory, exist_ok=True)).ino
        return ino

    async def _resolve(self, start: int, parts: Parts, follow: bool) -> Attributes:
        left = parts[::-1]
        directory = start
        links = 0
        attributes: Attributes | None = None
        while left:
            name = left.pop()
            attributes = await self.filesystem.lookup(directory, name)
            if attributes.kind is NodeKind.SYMLINK and (left or follow):
                links += 1
                if links > _SYMLINKS_MAX:
                    raise InvalidError(f"{os.fsdecode(b'/'.join(parts))}: too many symlinks")
                if attributes.target.startswith(b"/"):
                    directory = ROOT_INODE
                left += _parts(attributes.target)[::-1]
                attributes = None
            else:
                directory = attributes.ino
        if attributes is None:
            attributes = await self.filesystem.attributes(directory)
        return attributes


def _parts(path: Path) -> Parts:
    encoded = os.fsencode(path)
    if len(encoded) > PATH_MAX_BYTES:
        raise NameTooLongError(f"a path of {len(encoded)} bytes: at most {PATH_MAX_BYTES}")
    return [part for part in encoded.split(b"/") if part not in (b"", b".")]


async def _at_once(operations: Iterable[Callable[[], Awaitable[None]]]) -> None:
    """Run all, a bounded number at a time; the first error ends the others and is raised."""
    waiting = iter(operations)
    failures: list[CrailError] = []

    async def work(scope: trio.CancelScope) -> None:
        for operation in waiting:
            try:
                await operation()
            except CrailError as error:
                failures.append(error)
                scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(_REMOVALS_AT_ONCE_MAX):
            nursery.start_soon(work, nursery.cancel_scope)
    if failures:
        raise failures[0]
