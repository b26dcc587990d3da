"""The whole tree below a directory, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from crailfs.records import Attributes
from crailfs.units import ROOT_INODE

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem


async def walk(
    file_system: FileSystem, top: int = ROOT_INODE, prefix: bytes = b""
) -> AsyncIterator[tuple[bytes, Attributes]]:
    """Path and attributes of everything below ``top``, each directory before what is in it. What
    is removed meanwhile may be missing."""
    # One page of one directory on each level is held, however large the tree.
    from crailfs.errors import NotFoundError, StaleError

    after_name = b""
    while True:
        try:
            page = await file_system.read_directory(top, after_name)
        except (NotFoundError, StaleError):
            return
        for entry in page.entries:
            path = prefix + b"/" + entry.name
            yield path, entry.attributes
            if entry.attributes.is_directory:
                async for found in walk(file_system, entry.attributes.ino, path):
                    yield found
        if page.complete:
            return
        after_name = page.entries[-1].name
