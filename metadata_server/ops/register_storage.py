"""A storage server says who it is and which regions it has; may be repeated at will."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from crailfs.errors import InvalidError
from crailfs.limits import LOCATION_MAX_BYTES, REGION_BLOCKS_MAX, REGIONS_PER_SERVER_MAX
from crailfs.records import RegionInfo, StorageServerInfo
from crailfs.wire.messages import RegisterReply, RegisterStorage
from metadata_server import header_log, schema, sessions
from metadata_server.context import Context
from metadata_server.schema import StoredRegion, StoredServer
from metadata_server.txn import Txn

ID_BYTES = 16
_HEADER_SEQUENCE_MAX = 1 << 63


def run(txn: Txn, request: RegisterStorage, context: Context) -> RegisterReply:
    """A region that the server had before and does not name now is lost, until it names it: its
    header changes wait for that (nothing is granted there meanwhile, so each block is cleared at
    most once, and cut at most as often as it has bytes). One that comes with blocks of files and
    was never seen here is unclaimed."""
    server = request.server
    _check(server, request.regions, context.block_size_bytes)
    known = {}
    lost = {}
    for key, value in txn.scan(schema.REGIONS):
        stored = schema.decode_region(value)
        known[stored.info.uuid] = (key, stored)
        if stored.server_id == server.id:
            lost[key] = stored
    region_ids = []
    for info in request.regions:
        if info.uuid in known:
            key, stored = known[info.uuid]
            _check_same(stored, server, info)
            lost.pop(key)
            stored = replace(stored, info=info, lost=False)
        else:
            key = schema.region_key(txn.next_counter(b"next_region"))
            stored = StoredRegion(info, server.id, usable_blocks=0, unclaimed=info.held_blocks > 0)
        txn.put(schema.REGIONS, key, schema.encode(stored))
        header_log.begin_above(txn, info.header_sequence)
        region_ids.append(schema.unpack_region(key))
    for key, stored in lost.items():
        txn.put(schema.REGIONS, key, schema.encode(replace(stored, lost=True)))
    stored_server = StoredServer(replace(server, alive=True, seconds_since_heard=0.0))
    txn.put(schema.SERVERS, server.id, schema.encode(stored_server))
    return RegisterReply(tuple(region_ids), sessions.to_fence(txn, server.id))


def _check(server: StorageServerInfo, regions: Sequence[RegionInfo], block_size_bytes: int) -> None:
    if len(server.id) != ID_BYTES or any(len(region.uuid) != ID_BYTES for region in regions):
        raise InvalidError(f"ids of storage servers and regions are {ID_BYTES} bytes")
    if len(regions) > REGIONS_PER_SERVER_MAX:
        raise InvalidError(f"{len(regions)} regions: a server has at most {REGIONS_PER_SERVER_MAX}")
    if len({region.uuid for region in regions}) != len(regions):
        raise InvalidError(f"storage server {server.host} names a region twice")
    for name in (server.host, server.rack):
        if len(name.encode()) > LOCATION_MAX_BYTES:
            raise InvalidError(f"host or rack {name[:80]!r}: at most {LOCATION_MAX_BYTES} bytes")
    for region in regions:
        if region.block_size_bytes != block_size_bytes:
            raise InvalidError(
                f"region {region.label} has blocks of {region.block_size_bytes} bytes, the cluster "
                f"of {block_size_bytes}: remove the region's file, it is then made anew"
            )
        if not 1 <= region.block_count <= REGION_BLOCKS_MAX:
            raise InvalidError(
                f"region {region.label} has {region.block_count} blocks: between 1 and "
                f"{REGION_BLOCKS_MAX} are possible"
            )
        held_max = region.block_count if region.keeps_headers else 0
        if not (
            0 <= region.held_blocks <= held_max
            and 0 <= region.header_sequence <= _HEADER_SEQUENCE_MAX
        ):
            raise InvalidError(
                f"region {region.label} says that {region.held_blocks} of {region.block_count} "
                f"blocks are held, as of header change {region.header_sequence}: that cannot be"
            )


def _check_same(stored: StoredRegion, server: StorageServerInfo, info: RegionInfo) -> None:
    if stored.server_id != server.id:
        raise InvalidError(
            f"region {info.label} belongs to storage server {stored.server_id.hex()}: start it "
            f"with that server's state directory, or remove the region's file"
        )
    if info.tier != stored.info.tier or info.block_count < stored.usable_blocks:
        raise InvalidError(
            f"region {info.label} was of tier {stored.info.tier.name.lower()} with "
            f"{stored.info.block_count} blocks and cannot become another: restore its configuration"
        )
    if stored.info.keeps_headers and not info.keeps_headers:
        raise InvalidError(
            f"region {info.label} kept headers of its blocks and cannot do without: restore its "
            f"configuration"
        )
