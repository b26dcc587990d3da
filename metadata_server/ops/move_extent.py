"""Put copies of some of a file's blocks in their place: the file itself does not change."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import ConflictError, InvalidError
from crailfs.limits import EXTENT_BLOCKS_MAX
from crailfs.records import DATA_KINDS, Attributes, Extent
from crailfs.wire.messages import Empty, MoveExtent
from metadata_server import extents, schema, space
from metadata_server.context import Context
from metadata_server.ops._commits import check_extents
from metadata_server.ops._nodes import kind_name
from metadata_server.txn import Txn


def run(txn: Txn, request: MoveExtent, context: Context) -> Empty:
    """Raises StaleError (the file is gone), ConflictError (it no longer has ``old`` as it was) and
    FencedError (a block of ``new`` is not the client's to give).

    The old blocks are kept until no other client trusts a map that shows them.
    """
    node = txn.node(request.ino)
    if node.kind not in DATA_KINDS:
        raise InvalidError(f"inode {node.ino} is a {kind_name(node.kind)} and holds no data")
    old = request.old
    block_size_bytes = context.block_size_bytes
    if not 0 <= old.file_block < extents.FILE_BLOCK_END - EXTENT_BLOCKS_MAX:
        raise InvalidError(f"no file has a block {old.file_block}")
    if not 1 <= old.block_count <= EXTENT_BLOCKS_MAX:
        raise InvalidError(f"an extent has 1 to {EXTENT_BLOCKS_MAX} blocks, not {old.block_count}")
    end = extents.end_of(old)
    found = extents.overlapping(txn, node.ino, old.file_block, end, limit=2)
    if (
        len(found) != 1
        or found[0].file_block > old.file_block
        or extents.end_of(found[0]) < end
        or extents.cut(found[0], old.file_block, end, block_size_bytes) != old
    ):
        raise ConflictError(
            f"blocks {old.file_block} to {end - 1} of inode {node.ino} were changed meanwhile: "
            "what was copied is not theirs any more"
        )
    check_extents(request.new, node.size, block_size_bytes)
    _check_copies(old, request.new, block_size_bytes)
    if node.placement.pinned or not all(_allowed(txn, node, extent) for extent in request.new):
        raise ConflictError(
            f"inode {node.ino} is pinned, or its storage class does not allow the tier: it stays"
        )
    if node.synced and _outlives(txn, old) and not all(_outlives(txn, e) for e in request.new):
        raise InvalidError(
            f"inode {node.ino} was made durable: it is not moved to where a power cut takes it"
        )
    space.take_extents(txn, context, node.ino, request.new)
    txn.put_node(replace(node, moves=node.moves + 1))
    context.changed(node.ino)
    return Empty()


def _check_copies(old: Extent, new: tuple[Extent, ...], block_size_bytes: int) -> None:
    """Raise InvalidError unless ``new`` has exactly the blocks and bytes of ``old``."""
    next_block = old.file_block
    for extent in new:
        end = extents.end_of(extent)
        if extent.file_block != next_block or end > extents.end_of(old):
            break
        same = extents.cut(old, extent.file_block, end, block_size_bytes)
        if replace(same, replicas=extent.replicas) != extent:
            break
        next_block = end
    if next_block != extents.end_of(old):
        raise InvalidError(
            f"the copies of blocks {old.file_block} to {extents.end_of(old) - 1} differ from them "
            f"at block {next_block}"
        )


def _allowed(txn: Txn, node: Attributes, extent: Extent) -> bool:
    """Whether the node's class, which may have been set meanwhile, has room for the extent."""
    allowed = node.placement.storage_class
    values = (txn.get(schema.REGIONS, schema.region_key(p.region)) for p in extent.replicas)
    return all(
        value is not None and allowed.first <= schema.decode_region(value).info.tier <= allowed.last
        for value in values
    )


def _outlives(txn: Txn, extent: Extent) -> bool:
    """Whether all replicas lie where a flush makes bytes outlive a power cut."""
    regions = (
        txn.get(schema.REGIONS, schema.region_key(place.region)) for place in extent.replicas
    )
    return all(value is not None and schema.decode_region(value).info.durable for value in regions)
