"""The node that a name in a directory points to."""

from __future__ import annotations

from crailfs.records import Attributes
from crailfs.wire.messages import Lookup
from metadata_server.context import Context
from metadata_server.ops._names import check_name
from metadata_server.ops._nodes import child, directory, entry_node
from metadata_server.txn import Txn


def run(txn: Txn, request: Lookup, context: Context) -> Attributes:
    """``.`` and ``..`` are answered too. That there is no such name may be cached as well."""
    parent, name = request.parent, request.name
    context.shown.append(parent)
    ino = txn.entry(parent, name)
    if ino is not None:
        context.shown.append(ino)
        return entry_node(txn, parent, name, ino)
    node = directory(txn, parent)
    if name in (b".", b".."):
        node = node if name == b"." else txn.node(node.parent)
        context.shown.append(node.ino)
        return node
    check_name(name)
    return child(txn, parent, name)
