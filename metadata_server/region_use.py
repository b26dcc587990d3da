"""How full regions and tiers are."""

from __future__ import annotations

from dataclasses import dataclass

from crailfs.records import Tier
from crailfs.wire.messages import RegionUse
from metadata_server import free_space, schema
from metadata_server.schema import StoredRegion
from metadata_server.txn import Txn


def of_regions(txn: Txn) -> tuple[RegionUse, ...]:
    """All that were ever registered, in the order of their ids."""
    return tuple(
        _region_use(txn, key, schema.decode_region(value))
        for key, value in txn.scan(schema.REGIONS)
    )


@dataclass(slots=True)
class TierUse:
    """Of a tier's regions in which blocks can be granted now."""

    total_blocks: int = 0
    used_blocks: int = 0
    """Files' and granted: without what comes free by itself."""
    durable: bool = True
    """Whether all of them are."""

    @property
    def share(self) -> float:
        return self.used_blocks / self.total_blocks if self.total_blocks else 0.0


def of_tiers(txn: Txn) -> dict[Tier, TierUse]:
    """Each tier that has regions on servers that are alive."""
    alive = {
        key for key, value in txn.scan(schema.SERVERS) if schema.decode_server(value).info.alive
    }
    tiers: dict[Tier, TierUse] = {}
    for key, value in txn.scan(schema.REGIONS):
        stored = schema.decode_region(value)
        if stored.lost or stored.unclaimed or stored.server_id not in alive:
            continue
        use = _region_use(txn, key, stored)
        tier = tiers.setdefault(stored.info.tier, TierUse())
        total_blocks = stored.info.block_count - use.failed_blocks
        tier.total_blocks += total_blocks
        tier.used_blocks += total_blocks - use.free_blocks - use.returning_blocks
        tier.durable &= stored.info.durable
    return tiers


def _region_use(txn: Txn, key: bytes, stored: StoredRegion) -> RegionUse:
    usage = free_space.usage(txn, key)
    return RegionUse(
        region_id=schema.unpack_region(key),
        free_blocks=usage.free_blocks + stored.info.block_count - stored.usable_blocks,
        returning_blocks=usage.reclaim_blocks + usage.clearing_blocks,
        failed_blocks=len(stored.failed),
        lost=stored.lost,
    )
