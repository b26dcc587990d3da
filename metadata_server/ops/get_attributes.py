"""A node's attributes."""

from __future__ import annotations

from crailfs.records import Attributes
from crailfs.wire.messages import GetAttributes
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: GetAttributes, context: Context) -> Attributes:
    node = txn.node(request.ino)
    context.shown.append(request.ino)
    return node
