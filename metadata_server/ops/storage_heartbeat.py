"""A storage server is alive; what has become usable, what failed, whom it has cut off."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import InvalidError
from crailfs.wire.messages import HeartbeatReply, RegionState, StorageHeartbeat
from metadata_server import free_space, schema, sessions, space
from metadata_server.context import Context
from metadata_server.ops.register_storage import ID_BYTES
from metadata_server.schema import StoredRegion
from metadata_server.txn import Txn


def run(txn: Txn, request: StorageHeartbeat, context: Context) -> HeartbeatReply:
    if len(request.server_id) != ID_BYTES:
        raise InvalidError(f"ids of storage servers are {ID_BYTES} bytes")
    server = txn.get(schema.SERVERS, request.server_id)
    if server is None or not schema.decode_server(server).info.alive:
        return HeartbeatReply(known=False, fence=(), high_water_blocks=())
    high_water_blocks = []
    for state in request.regions:
        key = _region_key(state)
        value = txn.get(schema.REGIONS, key)
        stored = None if value is None else schema.decode_region(value)
        if stored is None or stored.server_id != request.server_id:
            raise InvalidError(
                f"region {state.region_id} is not one of storage server "
                f"{request.server_id.hex()}: it must register again"
            )
        _update(txn, context, key, stored, state)
        high_water_blocks.append(free_space.usage(txn, key).high_water_blocks)
    for client_id in request.fenced:
        sessions.fenced(txn, client_id, request.server_id)
    return HeartbeatReply(
        known=True,
        fence=sessions.to_fence(txn, request.server_id),
        high_water_blocks=tuple(high_water_blocks),
    )


def _region_key(state: RegionState) -> bytes:
    if not 0 <= state.region_id < space.REGION_ID_END:
        raise InvalidError(f"no region has the id {state.region_id}")
    return schema.region_key(state.region_id)


def _update(
    txn: Txn, context: Context, key: bytes, stored: StoredRegion, state: RegionState
) -> None:
    """Usable blocks only grow: what was handed out once stays accounted for."""
    usable_blocks = max(stored.usable_blocks, state.usable_blocks)
    if usable_blocks > stored.info.block_count:
        raise InvalidError(
            f"region {state.region_id} cannot have {usable_blocks} usable blocks: it has "
            f"{stored.info.block_count} blocks"
        )
    if usable_blocks > stored.usable_blocks:
        span = free_space.Span(
            state.region_id, stored.usable_blocks, usable_blocks - stored.usable_blocks
        )
        free_space.give(txn, [span])
    # A failed block that somebody has is not free to be retired yet; its server names it again.
    failed = {
        block
        for block in set(state.failed_blocks).difference(stored.failed)
        if 0 <= block < usable_blocks and free_space.retire(txn, state.region_id, block)
    }
    changed = replace(
        stored,
        usable_blocks=usable_blocks,
        failed=tuple(sorted({*stored.failed, *failed})),
        full_since_ns=_full_since_ns(txn, context, key, stored, usable_blocks),
    )
    if changed != stored:
        txn.put(schema.REGIONS, key, schema.encode(changed))


def _full_since_ns(
    txn: Txn, context: Context, key: bytes, stored: StoredRegion, usable_blocks: int
) -> int:
    if usable_blocks > stored.usable_blocks or free_space.usage(txn, key).free_blocks:
        return 0
    return stored.full_since_ns or context.now_ns
