"""Publish blocks that a client has written, as a file's content: all or nothing."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import ConflictError, InvalidError
from crailfs.records import DATA_KINDS, Attributes, Location
from crailfs.wire.messages import CommitFile
from metadata_server import extents, space
from metadata_server.context import Context
from metadata_server.ops._commits import check_extents
from metadata_server.ops._nodes import TIME_LIMIT_NS, kind_name
from metadata_server.txn import Txn


def run(txn: Txn, request: CommitFile, context: Context) -> Attributes:
    """A commit of nothing changes neither times nor versions: it is how a client says that what is
    there already shall outlive a power cut.

    Raises StaleError (the file is gone), FencedError (a block is not the client's to give) and
    ConflictError (a block in ``bases`` is not what it was)."""
    node = txn.node(request.ino)
    if node.kind not in DATA_KINDS:
        raise InvalidError(f"inode {node.ino} is a {kind_name(node.kind)} and holds no data")
    if not -TIME_LIMIT_NS <= request.mtime_ns < TIME_LIMIT_NS:
        raise InvalidError(f"a time of {request.mtime_ns} ns does not fit into 64 bits")
    size = max(node.size, request.minimum_size)
    for base in request.bases:
        if not 0 <= base.file_block < extents.FILE_BLOCK_END:
            raise InvalidError(f"no file has a block {base.file_block}")
        place = extents.place_at(txn, node.ino, base.file_block)
        if place != Location(base.region, base.block, base.generation):
            raise ConflictError(
                f"block {base.file_block} of inode {node.ino} is now block {place.block} of region "
                f"{place.region}, generation {place.generation}: it was changed meanwhile; merge "
                f"with it and commit again"
            )
    # After the bases: a block built on bytes that were cut meanwhile is a conflict, no mistake.
    check_extents(request.extents, size, context.block_size_bytes)
    growth = space.take_extents(txn, context, node.ino, request.extents)
    if request.unused:
        space.give_back(txn, context, request.unused)
    changed = bool(request.extents) or size != node.size
    node = replace(
        node,
        size=size,
        block_count=node.block_count + growth,
        mtime_ns=request.mtime_ns if changed else node.mtime_ns,
        ctime_ns=context.now_ns if changed else node.ctime_ns,
        data_version=node.data_version + changed,
        synced=node.synced or request.durable,
    )
    txn.put_node(node)
    context.changed(node.ino)
    context.shown.append(node.ino)
    return node
