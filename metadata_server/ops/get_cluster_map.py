"""Which storage servers there are, and which regions they have."""

from __future__ import annotations

from crailfs.records import PlacedRegion
from crailfs.wire.messages import ClusterMap, GetClusterMap
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: GetClusterMap, context: Context) -> ClusterMap:
    """A lost region is not in the map: who reads from it finds its blocks lost."""
    servers = [schema.decode_server(value).info for _, value in txn.scan(schema.SERVERS)]
    regions = [
        (schema.unpack_region(key), schema.decode_region(value))
        for key, value in txn.scan(schema.REGIONS)
    ]
    return ClusterMap(
        txn.state(b"cluster_id"),
        context.block_size_bytes,
        tuple(servers),
        tuple(
            PlacedRegion(region_id, stored.server_id, stored.info, stored.unclaimed)
            for region_id, stored in regions
            if not stored.lost
        ),
    )
