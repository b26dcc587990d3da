"""Look at an LMDB file before LMDB does.

LMDB maps its file and trusts it: a page that is missing ends the process by a signal, a page that
is wrong may too. This walks from the newest meta page over every page that the database uses and
checks that it is there, is the page it says it is, and that each table has as many rows as its
root says. LMDB keeps no checksums: a value that was changed in place is not found here, but when
it is read (see ``txn.py``).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from crailfs.errors import DamagedError

_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1
_PAGE_HEADER = struct.Struct("=QHHHH")
"""Page number, padding, flags, end of the node offsets, begin of the nodes."""
_OVERFLOW_HEADER = struct.Struct("=QHHI")
_META = struct.Struct("=II8x8x48s48sQQ")
"""Magic, version, (address, map size), free list's root, main root, last page, transaction."""
_ROOT = struct.Struct("=IHHQQQQQ")
"""Padding (page size in the free list's), flags, depth, pages (3), rows, page number."""
_NODE = struct.Struct("=HHHH")
_PAGE_NUMBER = struct.Struct("=Q")
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
_BIG_DATA, _SUB_DATABASE = 0x01, 0x02
_NO_PAGE = (1 << 64) - 1
_META_PAGES = 2
_MAIN = "main"


class _Meta(NamedTuple):
    page_bytes: int
    free_root: bytes
    main_root: bytes
    last_page: int
    transaction: int


def check_database(path: Path) -> None:
    """Raise DamagedError unless the LMDB file at ``path`` can be mapped and used.

    LMDB leaves its file shorter than the last page when that was freed again in the transaction
    that took it; then the file is extended, so that no access to it can fail. A database of
    1,000,000 files (190 MB) takes half a second.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(descriptor).st_size
        if not size_bytes:
            raise _damaged(path, "it is empty")
        with mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ) as mapping:
            meta = _newest_meta(path, mapping)
            needed_bytes = (meta.last_page + 1) * meta.page_bytes
            _Walk(path, mapping, meta.page_bytes).run(meta)
        if size_bytes < needed_bytes:
            os.ftruncate(descriptor, needed_bytes)
    finally:
        os.close(descriptor)


def _newest_meta(path: Path, mapping: mmap.mmap) -> _Meta:
    metas = []
    page_bytes = mmap.PAGESIZE
    for page in range(_META_PAGES):
        offset = page * page_bytes + _PAGE_HEADER.size
        if offset + _META.size > len(mapping):
            break
        magic, version, free_root, main_root, last_page, transaction = _META.unpack_from(
            mapping, offset
        )
        if magic == _META_MAGIC and version == _META_VERSION:
            page_bytes = _ROOT.unpack(free_root)[0] or page_bytes
            metas.append(_Meta(page_bytes, free_root, main_root, last_page, transaction))
    if len(metas) < _META_PAGES:
        raise _damaged(path, "its meta pages are not those of an LMDB database")
    return max(metas, key=lambda meta: meta.transaction)


class _Walk:
    def __init__(self, path: Path, mapping: mmap.mmap, page_bytes: int) -> None:
        self._path = path
        self._mapping = mapping
        self._page_bytes = page_bytes
        self._page_count = len(mapping) // page_bytes

    def run(self, meta: _Meta) -> None:
        self._tree("free list", meta.free_root)
        for name, root in self._tree(_MAIN, meta.main_root):
            self._tree(name, root)

    def _tree(self, name: str, root: bytes) -> list[tuple[str, bytes]]:
        """Walk one tree; returns the roots of those that it names."""
        _, _, depth, _, _, _, rows, root_page = _ROOT.unpack(root)
        below: list[tuple[str, bytes]] = []
        counted = 0
        pending = [] if root_page == _NO_PAGE else [(root_page, depth)]
        while pending:
            page, height = pending.pop()
            offset, node_offsets = self._page(name, page, _LEAF if height == 1 else _BRANCH)
            if height > 1:
                for node_offset in node_offsets:
                    low, high, top, _ = _NODE.unpack_from(self._mapping, offset + node_offset)
                    pending.append((low | high << 16 | top << 32, height - 1))
                continue
            counted += len(node_offsets)
            for node_offset in node_offsets:
                at = offset + node_offset
                _, _, flags, key_bytes = _NODE.unpack_from(self._mapping, at)
                if flags:
                    self._special(name, at + _NODE.size, flags, key_bytes, below)
        if counted != rows:
            raise _damaged(self._path, f"table {name!r} has {counted} rows instead of {rows}")
        return below

    def _special(
        self, name: str, key_at: int, flags: int, key_bytes: int, below: list[tuple[str, bytes]]
    ) -> None:
        """A row that is kept on pages of its own, or that is the root of another tree."""
        data_at = key_at + key_bytes
        if flags == _BIG_DATA:
            (page,) = _PAGE_NUMBER.unpack_from(self._mapping, data_at)
            self._check_overflow(name, page)
        elif flags == _SUB_DATABASE and name == _MAIN:
            table = self._mapping[key_at:data_at].decode("ascii", "replace")
            below.append((table, self._mapping[data_at : data_at + _ROOT.size]))
        else:
            raise _damaged(self._path, f"table {name!r} has a row of an unknown kind")

    def _page(self, name: str, page: int, kind: int) -> tuple[int, tuple[int, ...]]:
        """The offset of a tree's page and, relative to it, those of its nodes."""
        offset = page * self._page_bytes
        if not _META_PAGES <= page < self._page_count:
            raise _damaged(self._path, f"page {page} of table {name!r} is beyond the file's end")
        number, _, flags, lower, upper = _PAGE_HEADER.unpack_from(self._mapping, offset)
        if number != page or flags != kind:
            raise _damaged(self._path, f"page {page} of table {name!r} is another one")
        if not _PAGE_HEADER.size <= lower <= upper <= self._page_bytes:
            raise _damaged(self._path, f"page {page} of table {name!r} has a bad header")
        count = (lower - _PAGE_HEADER.size) // 2
        node_offsets = struct.unpack_from(f"={count}H", self._mapping, offset + _PAGE_HEADER.size)
        if count and not upper <= min(node_offsets) <= max(node_offsets) < self._page_bytes:
            raise _damaged(self._path, f"page {page} of table {name!r} has rows outside of it")
        return offset, node_offsets

    def _check_overflow(self, name: str, page: int) -> None:
        if not _META_PAGES <= page < self._page_count:
            raise _damaged(self._path, f"page {page} of table {name!r} is beyond the file's end")
        number, _, flags, count = _OVERFLOW_HEADER.unpack_from(
            self._mapping, page * self._page_bytes
        )
        if number != page or flags != _OVERFLOW or page + count > self._page_count:
            raise _damaged(self._path, f"page {page} of table {name!r} is another one")


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"database {path} is damaged: {what}. Nothing was changed. Restore the metadata server's "
        f"state directory from a backup; 'crail fsck' shows what a restored one holds"
    )
