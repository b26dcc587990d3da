"""chmod, chown, utimens and truncate in one request."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from crailfs.errors import InvalidError, IsADirectoryCrailError, TooLargeError
from crailfs.limits import FILE_SIZE_MAX_BYTES
from crailfs.records import DATA_KINDS, Attributes
from crailfs.wire.messages import SetAttributes
from metadata_server import space
from metadata_server.context import Context
from metadata_server.ops._nodes import TIME_LIMIT_NS, check_owner, kind_name
from metadata_server.txn import Txn


def run(txn: Txn, request: SetAttributes, context: Context) -> Attributes:
    node = txn.node(request.ino)
    check_owner(request.uid, request.gid)
    for time_ns in (request.atime_ns, request.mtime_ns):
        if time_ns is not None and not -TIME_LIMIT_NS <= time_ns < TIME_LIMIT_NS:
            raise InvalidError(f"a time of {time_ns} ns does not fit into 64 bits")
    node = replace(node, ctime_ns=context.now_ns)
    if request.size is not None:
        node = _resize(txn, context, node, request.size)
    if request.uid is not None or request.gid is not None:
        node = replace(
            node,
            uid=node.uid if request.uid is None else request.uid,
            gid=node.gid if request.gid is None else request.gid,
            mode=node.mode if node.is_directory else _without_set_id(node.mode),
        )
    if request.mode is not None:
        node = replace(node, mode=stat.S_IMODE(request.mode))
    if request.atime_ns is not None:
        node = replace(node, atime_ns=request.atime_ns)
    if request.mtime_ns is not None:
        node = replace(node, mtime_ns=request.mtime_ns)
    txn.put_node(node)
    context.changed(node.ino)
    context.shown.append(node.ino)
    return node


def _without_set_id(mode: int) -> int:
    """What a change of owner leaves of a file's mode: set-gid without group execution is a mark for
    mandatory locking, and stays."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def _resize(txn: Txn, context: Context, node: Attributes, size: int) -> Attributes:
    """Cut ``node`` or extend it with a hole; moves no data."""
    if node.is_directory:
        raise IsADirectoryCrailError(f"inode {node.ino} is a directory: it has no size to set")
    if node.kind not in DATA_KINDS or size < 0:
        raise InvalidError(f"inode {node.ino}, a {kind_name(node.kind)}: cannot be {size} bytes")
    if size > FILE_SIZE_MAX_BYTES:
        raise TooLargeError(f"{size} bytes: a file has at most {FILE_SIZE_MAX_BYTES}")
    block_count = node.block_count
    if size < node.size:
        block_count -= space.truncate_extents(txn, context, node.ino, size)
    return replace(
        node,
        size=size,
        block_count=block_count,
        mtime_ns=context.now_ns,
        data_version=node.data_version + (size != node.size),
    )
