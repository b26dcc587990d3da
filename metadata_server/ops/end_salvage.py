"""What the files of a lost name space did not need of its regions can be used again."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import InvalidError, TryAgainError
from crailfs.wire.messages import Empty, EndSalvage
from metadata_server import schema, space
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: EndSalvage, context: Context) -> Empty:
    """Without a salvage before: all that the regions hold is given up. May be repeated.

    TryAgainError: not all of a region's blocks are served yet.
    """
    for region in request.regions:
        if not 0 <= region < space.REGION_ID_END:
            raise InvalidError(f"no region has the id {region}")
        key = schema.region_key(region)
        value = txn.get(schema.REGIONS, key)
        stored = None if value is None else schema.decode_region(value)
        if stored is None or stored.lost:
            raise InvalidError(f"there is no region {region}, or its storage server came without")
        if not stored.unclaimed:
            continue
        if stored.usable_blocks < stored.info.block_count:
            # What becomes usable later is free at once: no header may name it by then.
            raise TryAgainError(
                f"region {region} has {stored.usable_blocks} usable blocks of "
                f"{stored.info.block_count} so far"
            )
        space.claim_rest(txn, region)
        txn.put(schema.REGIONS, key, schema.encode(replace(stored, unclaimed=False)))
    return Empty()
