"""Hand free blocks to a client, which may then write into them."""

from __future__ import annotations

from crailfs.errors import FencedError
from crailfs.wire.messages import Grant, GrantBlocks
from metadata_server import sessions, space
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: GrantBlocks, context: Context) -> Grant:
    if not sessions.is_live(txn, context.client_id):
        raise FencedError(
            f"client {context.client_id:016x} has no session: only one that keeps alive is granted "
            f"blocks"
        )
    return Grant(
        space.grant(
            txn,
            context,
            storage_class=request.storage_class,
            location=request.location,
            host=request.host,
            block_count=request.block_count,
            contiguous_blocks=request.contiguous_blocks,
        )
    )
