"""Create a KEYVALUE of a TABLE, or replace its whole value, in one step."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from crailfs.errors import NotPermittedError
from crailfs.records import Attributes, NodeKind
from crailfs.wire.messages import CreateNode, PutKeyValue
from metadata_server import space
from metadata_server.context import Context
from metadata_server.ops import create_node
from metadata_server.ops._commits import check_extents
from metadata_server.ops._nodes import directory, kind_name
from metadata_server.txn import Txn


def run(txn: Txn, request: PutKeyValue, context: Context) -> Attributes:
    """A value that is replaced keeps its inode, owner and mode, as a file that is written anew."""
    table = directory(txn, request.table)
    if table.kind is not NodeKind.TABLE:
        raise NotPermittedError(
            f"inode {table.ino} is a {kind_name(table.kind)}: key-values are put into tables only"
        )
    check_extents(request.extents, request.size, context.block_size_bytes)
    node = create_node.run(
        txn,
        CreateNode(
            parent=table.ino,
            name=request.key,
            kind=NodeKind.KEYVALUE,
            mode=stat.S_IMODE(request.mode),
            uid=request.uid,
            gid=request.gid,
            exclusive=False,
        ),
        context,
    ).attributes
    released = space.release_extents(txn, context, node.ino, 0) if node.block_count else 0
    growth = space.take_extents(txn, context, node.ino, request.extents)
    space.give_back(txn, context, request.unused)
    node = replace(
        node,
        size=request.size,
        block_count=node.block_count - released + growth,
        mtime_ns=context.now_ns,
        ctime_ns=context.now_ns,
        data_version=node.data_version + 1,
    )
    txn.put_node(node)
    context.changed(node.ino)
    return node
