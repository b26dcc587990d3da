"""Granted blocks that a client did not use become free."""

from __future__ import annotations

from crailfs.wire.messages import Empty, ReturnBlocks
from metadata_server import space
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: ReturnBlocks, context: Context) -> Empty:
    space.give_back(txn, context, request.runs)
    return Empty()
