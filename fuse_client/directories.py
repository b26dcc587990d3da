"""Reading a directory that changes meanwhile.

The kernel continues a listing by a 64-bit cookie. Here a cookie is an index into the names that
this handle has reported. The name space lists in byte order and continues after a *name*, so what
is added or removed between two requests shifts nothing: an entry that is there throughout is
reported exactly once. Only the page in use keeps its attributes, so that a handle on a directory
of 100,000 entries holds their names and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crailfs.errors import StaleError
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import DirectoryEntry, DirectoryPage

if TYPE_CHECKING:
    from crailfs.client.filesystem import FileSystem

PAGE_ENTRIES: Final = 1_024
DOTS: Final = 2
"""``.`` and ``..`` come first."""


class DirectoryReader:
    """One open directory: its entries by index."""

    def __init__(self, ino: int, file_system: FileSystem) -> None:
        self.ino = ino
        self._fs = file_system
        self._page: tuple[DirectoryEntry, ...] = ()
        self._page_index = 0
        self._names: list[bytes] = []
        self._complete = False

    async def entries_from(self, index: int) -> tuple[DirectoryEntry, ...]:
        """The entries known from ``index`` on, at least one unless the directory ends there.

        Index 0 begins a new listing (``rewinddir``). An index that was never given out is the end,
        and so is any in a directory that was removed meanwhile.
        """
        if index == 0 or index < self._page_index:
            # Back behind the page in use (seekdir): listed again, after the name that was there.
            del self._names[index:]
            self._complete = False
        if index == len(self._names) and not self._complete:
            await self._read_page()
        return self._page[index - self._page_index :]

    async def _read_page(self) -> None:
        self._page_index = len(self._names)
        try:
            page = await self._next_page()
        except StaleError:
            page = DirectoryPage((), complete=True)
        self._page = page.entries
        self._names.extend(entry.name for entry in page.entries)
        self._complete = page.complete

    async def _next_page(self) -> DirectoryPage:
        if len(self._names) >= DOTS:
            after = self._names[-1] if len(self._names) > DOTS else b""
            return await self._fs.read_directory(self.ino, after, PAGE_ENTRIES)
        own = await self._fs.attributes(self.ino)
        parent = own if self.ino == ROOT_INODE else await self._fs.attributes(own.parent)
        dots = (DirectoryEntry(b".", own), DirectoryEntry(b"..", parent))
        return DirectoryPage(dots[len(self._names) :], complete=False)
