"""Create or replace an extended attribute; those under ``user.crail.`` set the placement."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import AttributeSpaceError, ExistsError, InvalidError, NoAttributeError
from crailfs.limits import XATTR_TOTAL_MAX_BYTES, XATTR_VALUE_MAX_BYTES
from crailfs.wire.messages import Empty, SetXattr, XattrFlag
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._xattrs import CRAIL_PREFIX, check_xattr_name, placement_set
from metadata_server.txn import Txn


def run(txn: Txn, request: SetXattr, context: Context) -> Empty:
    if request.flags not in (XattrFlag.NONE, XattrFlag.CREATE, XattrFlag.REPLACE):
        raise InvalidError("extended attribute: CREATE and REPLACE exclude each other")
    node = replace(txn.node(request.ino), ctime_ns=context.now_ns)
    name, value = request.name, request.value
    check_xattr_name(node, name)
    if name.startswith(CRAIL_PREFIX):
        placement = placement_set(name, node, value, context.block_size_bytes)
        _check_flags(request, exists=True)
        node = replace(node, placement=placement)
    else:
        if len(value) > XATTR_VALUE_MAX_BYTES:
            raise AttributeSpaceError(
                f"extended attribute {name!r}: {len(value)} bytes, at most {XATTR_VALUE_MAX_BYTES}"
            )
        key = schema.xattr_key(node.ino, name)
        _check_flags(request, exists=txn.get(schema.XATTRS, key) is not None)
        txn.put(schema.XATTRS, key, value)
        _check_total(txn, node.ino)
    txn.put_node(node)
    context.changed(node.ino)
    return Empty()


def _check_flags(request: SetXattr, *, exists: bool) -> None:
    if exists and request.flags is XattrFlag.CREATE:
        raise ExistsError(f"inode {request.ino} already has the attribute {request.name!r}")
    if not exists and request.flags is XattrFlag.REPLACE:
        raise NoAttributeError(f"inode {request.ino} has no extended attribute {request.name!r}")


def _check_total(txn: Txn, ino: int) -> None:
    prefix = schema.node_key(ino)
    total_bytes = sum(
        len(key) - len(prefix) + len(value) for key, value in txn.scan_prefix(schema.XATTRS, prefix)
    )
    if total_bytes > XATTR_TOTAL_MAX_BYTES:
        raise AttributeSpaceError(
            f"inode {ino}: its extended attributes would take {total_bytes} bytes of at most "
            f"{XATTR_TOTAL_MAX_BYTES}"
        )
