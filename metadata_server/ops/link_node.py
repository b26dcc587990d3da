"""A further name for a node that is not a directory."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import ExistsError, NotFoundError, NotPermittedError
from crailfs.records import Attributes
from crailfs.wire.messages import LinkNode
from metadata_server.context import Context
from metadata_server.ops._names import check_name
from metadata_server.ops._nodes import (
    check_link_count,
    directory,
    kind_in,
    kind_name,
    put_entry,
    with_entry,
)
from metadata_server.txn import Txn


def run(txn: Txn, request: LinkNode, context: Context) -> Attributes:
    check_name(request.new_name)
    node = txn.node(request.ino)
    parent = directory(txn, request.new_parent)
    if txn.entry(parent.ino, request.new_name) is not None:
        raise ExistsError(f"directory {parent.ino} already has an entry {request.new_name!r}")
    if node.is_directory:
        raise NotPermittedError(f"inode {node.ino} is a directory: it has exactly one name")
    if node.nlink == 0:
        raise NotFoundError(f"inode {node.ino} has been removed")
    if kind_in(parent, node.kind) is not node.kind:
        raise NotPermittedError(
            f"a {kind_name(node.kind)} cannot be in the {kind_name(parent.kind)} {parent.ino}"
        )
    check_link_count(node)
    node = replace(node, nlink=node.nlink + 1, ctime_ns=context.now_ns)
    txn.put_node(node)
    put_entry(txn, parent.ino, request.new_name, node.ino)
    txn.put_node(with_entry(parent, context, entries=1, subdirectories=0))
    context.changed(node.ino)
    context.changed_entry(parent.ino, request.new_name)
    context.shown += (parent.ino, node.ino)
    return node
