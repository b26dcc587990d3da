"""Remove an extended attribute; one under ``user.crail.`` goes back to its default."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import NoAttributeError, NotPermittedError
from crailfs.records import Placement
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Empty, RemoveXattr
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._xattrs import CRAIL_XATTRS, check_xattr_name
from metadata_server.txn import Txn


def run(txn: Txn, request: RemoveXattr, context: Context) -> Empty:
    """The default of a directory's placement is its parent's; a file, which may have several
    parents, goes back to the file system's own."""
    node = replace(txn.node(request.ino), ctime_ns=context.now_ns)
    check_xattr_name(node, request.name)
    attribute = CRAIL_XATTRS.get(request.name)
    if attribute is not None:
        if attribute.reset is None:
            raise NotPermittedError(f"{request.name.decode()} is read-only")
        default = Placement()
        if node.is_directory and node.ino != ROOT_INODE and node.nlink:
            default = txn.node(node.parent).placement
        node = replace(node, placement=attribute.reset(node.placement, default))
    elif not txn.delete(schema.XATTRS, schema.xattr_key(node.ino, request.name)):
        raise NoAttributeError(f"inode {node.ino} has no extended attribute {request.name!r}")
    txn.put_node(node)
    context.changed(node.ino)
    return Empty()
