"""Reading a directory that changes meanwhile.

The kernel continues a listing by a 64-bit cookie. Here a cookie is an index into the names that
this handle has reported. The name space lists in byte order and continues after a *name*, so what
is added or removed between two requests shifts nothing: an entry that is there throughout is
reported exactly once. Only the page in use keeps its attributes, so that a handle on a directory
of 100,000 entries holds their names and no more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from crailfs.records import Attributes
from crailfs.wire.messages import DirectoryEntry, DirectoryPage

PAGE_ENTRIES = 1_024

ReadPage = Callable[[int, bytes, int], Awaitable[DirectoryPage]]
"""(directory, after this name, at most so many entries)"""


class DirectoryReader:
    """One open directory: its entries by index, ``.`` and ``..`` first."""

    def __init__(self, own: Attributes, parent: Attributes, read_page: ReadPage) -> None:
        self.ino = own.ino
        self._dots = [DirectoryEntry(b".", own), DirectoryEntry(b"..", parent)]
        self._read_page = read_page
        self._restart()

    def _restart(self) -> None:
        self._page = self._dots
        self._page_index = 0
        self._names = [entry.name for entry in self._dots]
        self._complete = False

    async def entries_from(self, index: int) -> list[DirectoryEntry]:
        """The entries known from ``index`` on, at least one unless the directory ends there.

        Index 0 begins a new listing (``rewinddir``). An index that was never given out is the end.
        """
        if index == 0:
            self._restart()
        if index < self._page_index:
            # Back behind the page in use (seekdir): listed again, after the name that was there.
            del self._names[max(index, len(self._dots)) :]
            self._complete = False
            if index < len(self._dots):
                self._page, self._page_index = self._dots, 0
            else:
                await self._read_next()
        elif index == len(self._names) and not self._complete:
            await self._read_next()
        return self._page[index - self._page_index :]

    async def _read_next(self) -> None:
        reported = len(self._names)
        after = self._names[-1] if reported > len(self._dots) else b""
        page = await self._read_page(self.ino, after, PAGE_ENTRIES)
        self._page = list(page.entries)
        self._page_index = reported
        self._names.extend(entry.name for entry in page.entries)
        self._complete = page.complete
