"""Listings fill the cache, and a whole one tells which names do not exist."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

from crailfs.client.cache import Entry, NodeCache, Ticket
from crailfs.wire.messages import DirectoryPage

_LISTINGS_MAX: Final = 256


class _Listing(NamedTuple):
    """A listing that has come as far as ``next_name`` without anything being forgotten since."""

    next_name: bytes
    names_epoch: int | None


class Listings:
    def __init__(self, cache: NodeCache) -> None:
        self._cache = cache
        self._under_way: OrderedDict[int, _Listing] = OrderedDict()

    def learn(self, ino: int, after_name: bytes, page: DirectoryPage, ticket: Ticket) -> None:
        """``page`` is what follows ``after_name`` in directory ``ino``."""
        cache = self._cache
        cache.show(ino, ticket)
        listing = self._under_way.pop(ino, None)
        epoch = cache.names_epoch(ino) if not after_name else None
        if after_name and listing is not None and listing.next_name == after_name:
            epoch = listing.names_epoch
        for entry in page.entries:
            cache.store_entry(ino, entry.name, Entry(entry.attributes.ino), ticket)
            cache.store(entry.attributes, ticket)
        if epoch is None:
            return
        if page.complete:
            cache.set_complete(ino, epoch)
        elif page.entries:
            self._under_way[ino] = _Listing(page.entries[-1].name, epoch)
            if len(self._under_way) > _LISTINGS_MAX:
                self._under_way.popitem(last=False)
