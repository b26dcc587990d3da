"""A page of a directory's entries, each with its node's attributes."""

from __future__ import annotations

from crailfs.errors import InvalidError, NotADirectoryCrailError
from crailfs.limits import BODY_MAX_BYTES, DIRECTORY_PAGE_ENTRIES_MAX
from crailfs.wire.messages import DirectoryEntry, DirectoryPage, ReadDirectory
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._nodes import entry_node
from metadata_server.txn import Txn

_PAGE_BYTES = BODY_MAX_BYTES // 4
"""Names and symlink targets after which a page ends: attributes add at most as much again."""


def run(txn: Txn, request: ReadDirectory, context: Context) -> DirectoryPage:
    """Pages follow each other by name, so what is added or removed in between moves nothing."""
    if request.entry_limit < 1:
        raise InvalidError(f"a directory page of {request.entry_limit} entries")
    node = txn.node(request.ino)
    if not node.is_directory:
        raise NotADirectoryCrailError(f"inode {request.ino} is not a directory")
    context.shown.append(node.ino)
    entry_limit = min(request.entry_limit, DIRECTORY_PAGE_ENTRIES_MAX)
    # No name has a NUL: this is the first key behind after_name.
    after = request.after_name + b"\0" if request.after_name else b""
    entries: list[DirectoryEntry] = []
    page_bytes = 0
    prefix_bytes = len(schema.node_key(node.ino))
    rows = txn.scan(
        schema.ENTRIES, schema.entry_key(node.ino, after), schema.node_key(node.ino + 1)
    )
    for key, value in rows:
        if len(entries) == entry_limit or page_bytes > _PAGE_BYTES:
            return DirectoryPage(tuple(entries), False)
        name = key[prefix_bytes:]
        child = entry_node(txn, node.ino, name, schema.unpack_u64(value))
        context.shown.append(child.ino)
        entries.append(DirectoryEntry(name, child))
        page_bytes += len(name) + len(child.target)
    return DirectoryPage(tuple(entries), True)
