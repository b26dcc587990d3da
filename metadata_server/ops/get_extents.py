"""Where a range of a file lies."""

from __future__ import annotations

from crailfs.errors import InvalidError
from crailfs.limits import EXTENT_PAGE_MAX, FILE_SIZE_MAX_BYTES
from crailfs.records import DATA_KINDS
from crailfs.wire.messages import ExtentPage, GetExtents
from metadata_server import extents
from metadata_server.context import Context
from metadata_server.last_use import note_use
from metadata_server.ops._nodes import kind_name
from metadata_server.txn import Txn


def run(txn: Txn, request: GetExtents, context: Context) -> ExtentPage:
    node = txn.node(request.ino)
    if node.kind not in DATA_KINDS:
        raise InvalidError(f"inode {node.ino} is a {kind_name(node.kind)} and holds no data")
    end_block = request.first_block + request.block_count
    if request.first_block < 0 or request.block_count < 1 or end_block > FILE_SIZE_MAX_BYTES:
        raise InvalidError(f"no file has blocks {request.first_block} to {end_block - 1}")
    node = note_use(txn, context, node)
    context.shown.append(node.ino)
    found = extents.overlapping(
        txn, node.ino, request.first_block, end_block, limit=EXTENT_PAGE_MAX + 1
    )
    page = tuple(found[:EXTENT_PAGE_MAX])
    next_block = extents.end_of(page[-1]) if len(found) > EXTENT_PAGE_MAX else end_block
    return ExtentPage(page, next_block, node)
