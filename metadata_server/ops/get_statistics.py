"""How much there is and how much of it is used."""

from __future__ import annotations

from crailfs.wire.messages import GetStatistics, Statistics
from metadata_server import space
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: GetStatistics, context: Context) -> Statistics:
    return Statistics(context.block_size_bytes, txn.state(b"node_count"), space.statistics(txn))
