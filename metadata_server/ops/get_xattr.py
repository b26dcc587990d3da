"""The value of one extended attribute."""

from __future__ import annotations

from crailfs.errors import NoAttributeError
from crailfs.wire.messages import GetXattr, XattrValue
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._xattrs import CRAIL_XATTRS, check_xattr_name
from metadata_server.txn import Txn


def run(txn: Txn, request: GetXattr, context: Context) -> XattrValue:
    node = txn.node(request.ino)
    check_xattr_name(node, request.name)
    attribute = CRAIL_XATTRS.get(request.name)
    if attribute is not None:
        return XattrValue(attribute.show(node, context.block_size_bytes).encode())
    value = txn.get(schema.XATTRS, schema.xattr_key(node.ino, request.name))
    if value is None:
        raise NoAttributeError(f"inode {node.ino} has no extended attribute {request.name!r}")
    return XattrValue(value)
