"""The names of a node's extended attributes."""

from __future__ import annotations

from crailfs.records import DATA_KINDS, DIRECTORY_KINDS
from crailfs.wire.messages import ListXattr, XattrNames
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._xattrs import CRAIL_XATTRS
from metadata_server.txn import Txn


def run(txn: Txn, request: ListXattr, context: Context) -> XattrNames:
    node = txn.node(request.ino)
    prefix = schema.node_key(node.ino)
    names = [key[len(prefix) :] for key, _ in txn.scan_prefix(schema.XATTRS, prefix)]
    if node.kind in DATA_KINDS | DIRECTORY_KINDS:
        names += CRAIL_XATTRS
    return XattrNames(tuple(names))
