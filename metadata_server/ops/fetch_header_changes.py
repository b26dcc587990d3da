"""A storage server asks what its regions' headers have to follow, and says what they have done."""

from __future__ import annotations

from crailfs.errors import InvalidError
from crailfs.limits import HEADER_CHANGES_MAX
from crailfs.wire.messages import FetchHeaderChanges, HeaderChanges
from metadata_server import header_log, schema, space
from metadata_server.context import Context
from metadata_server.ops.register_storage import ID_BYTES
from metadata_server.txn import Txn


def run(txn: Txn, request: FetchHeaderChanges, context: Context) -> HeaderChanges:
    """Only changes that outlive a power cut are told: a region's headers are never ahead of the
    name space, and a block is never used again while a power cut could give it back to its file."""
    if len(request.server_id) != ID_BYTES or txn.get(schema.SERVERS, request.server_id) is None:
        raise InvalidError(f"storage server {request.server_id.hex()} must register first")
    if not 1 <= request.change_limit <= HEADER_CHANGES_MAX:
        raise InvalidError(
            f"{request.change_limit} header changes at once: 1 to {HEADER_CHANGES_MAX} are possible"
        )
    if not 0 <= request.applied_sequence < txn.state(b"next_header_change"):
        raise InvalidError(
            f"storage server {request.server_id.hex()} says that it has applied header change "
            f"{request.applied_sequence}, which there has not been: it must register again"
        )
    stored_regions = (
        (schema.unpack_region(key), schema.decode_region(value))
        for key, value in txn.scan(schema.REGIONS)
    )
    regions = [
        region
        for region, stored in stored_regions
        if stored.server_id == request.server_id and stored.info.keeps_headers and not stored.lost
    ]
    # Nobody can have applied what was not told.
    told = context.synced_header_changes - 1
    space.free_cleared(txn, regions, min(request.applied_sequence, told))
    page = header_log.page(
        txn,
        regions,
        after=request.applied_sequence,
        end_sequence=min(context.synced_header_changes, header_log.SEQUENCE_MAX),
        limit=request.change_limit,
    )
    return HeaderChanges(*page)
