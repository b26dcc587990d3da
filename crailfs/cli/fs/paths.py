"""Paths of the command line -> nodes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from crailfs.errors import InvalidError, NotADirectoryCrailError, NotFoundError
from crailfs.units import ROOT_INODE

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem
    from crailfs.records import Attributes


class Place(NamedTuple):
    """Where a name is, or may be made."""

    parent: int
    name: bytes


def names_of(path: str) -> list[bytes]:
    """``/a/./b/../c`` -> a, c. Raises ``InvalidError`` for a path that does not begin with /."""
    if not path.startswith("/"):
        raise InvalidError(f"{path}: a path of the file system begins with /")
    names: list[bytes] = []
    for name in os.fsencode(path).split(b"/"):
        if name == b"..":
            names = names[:-1]
        elif name not in (b"", b"."):
            names.append(name)
    return names


async def find(file_system: FileSystem, path: str) -> Attributes:
    """The node at ``path``; symbolic links are not followed.

    Raises ``NotFoundError`` or ``NotADirectoryCrailError`` with the path.
    """
    return await _descend(file_system, path, names_of(path))


async def place(file_system: FileSystem, path: str) -> Place:
    """The directory that holds ``path``, which must exist, and its last name."""
    names = names_of(path)
    if not names:
        raise InvalidError(f"{path}: the root cannot be made, moved or removed")
    return Place((await _descend(file_system, path, names[:-1])).ino, names[-1])


async def _descend(file_system: FileSystem, path: str, names: list[bytes]) -> Attributes:
    node = await file_system.attributes(ROOT_INODE)
    for name in names:
        if not node.is_directory:
            raise NotADirectoryCrailError(f"{path}: a part of it is not a directory")
        try:
            node = await file_system.lookup(node.ino, name)
        except NotFoundError:
            raise NotFoundError(f"{path}: no such file or directory") from None
    return node
