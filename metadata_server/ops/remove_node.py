"""unlink and rmdir."""

from __future__ import annotations

from crailfs.errors import IsADirectoryCrailError, NotADirectoryCrailError, NotEmptyError
from crailfs.wire.messages import RemoveNode, RemoveReply
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._names import check_name
from metadata_server.ops._nodes import child, directory, drop_link, with_entry
from metadata_server.txn import Txn


def run(txn: Txn, request: RemoveNode, context: Context) -> RemoveReply:
    check_name(request.name)
    parent = directory(txn, request.parent)
    node = child(txn, parent.ino, request.name)
    if node.is_directory != request.directory:
        where = f"{request.name!r} in directory {parent.ino}"
        if request.directory:
            raise NotADirectoryCrailError(f"{where} is not a directory")
        raise IsADirectoryCrailError(f"{where} is a directory")
    if node.is_directory and node.size:
        raise NotEmptyError(f"directory {node.ino} ({request.name!r}) has {node.size} entries")
    txn.delete(schema.ENTRIES, schema.entry_key(parent.ino, request.name))
    parent = with_entry(parent, context, entries=-1, subdirectories=-int(node.is_directory))
    txn.put_node(parent)
    context.changed_entry(parent.ino, request.name)
    context.shown.append(parent.ino)
    nlink, held = drop_link(txn, context, node, request.not_open)
    return RemoveReply(node.ino, nlink, held, parent)
