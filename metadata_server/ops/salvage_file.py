"""Give a file of a lost name space the blocks that were found of it."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import ConflictError, InvalidError, NotPermittedError, TryAgainError
from crailfs.records import Attributes, Extent, NodeKind, Placement
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Empty, SalvageFile
from metadata_server import extents, schema, space
from metadata_server.context import Context
from metadata_server.ops._commits import check_extents
from metadata_server.ops._nodes import directory, put_entry, with_entry
from metadata_server.ops.begin_salvage import LOST_AND_FOUND
from metadata_server.schema import StoredRegion
from metadata_server.txn import Txn


def run(txn: Txn, request: SalvageFile, context: Context) -> Empty:
    """The file is /lost+found/inode-<number>, made when it is first named. A file can be named
    several times, with other blocks or the same: what it has already stays.

    NotPermittedError: no salvage has begun. ConflictError: the inode number is another file's, or
    the file has another block in that place. TryAgainError: the region does not serve the block
    yet.
    """
    if not txn.state(b"salvaging"):
        raise NotPermittedError("files can be salvaged only once a salvage has begun")
    if not ROOT_INODE < request.ino < txn.state(b"next_ino"):
        raise InvalidError(f"inode {request.ino} is none that this salvage began with")
    check_extents(request.extents, request.size, context.block_size_bytes)
    node = _node(txn, request.ino, context)
    growth = sum(_take(txn, context, request.ino, extent) for extent in request.extents)
    txn.put_node(
        replace(
            node,
            size=max(node.size, request.size),
            block_count=node.block_count + growth,
            ctime_ns=context.now_ns,
            data_version=node.data_version + bool(growth),
        )
    )
    context.changed(node.ino)
    return Empty()


def _node(txn: Txn, ino: int, context: Context) -> Attributes:
    folder_ino = txn.entry(ROOT_INODE, LOST_AND_FOUND)
    if folder_ino is None:
        raise ConflictError("/lost+found is gone: begin the salvage anew")
    folder = directory(txn, folder_ino)
    name = b"inode-%d" % ino
    node = txn.find_node(ino)
    if txn.entry(folder.ino, name) != (None if node is None else ino):
        raise ConflictError(f"inode {ino} is not that of /lost+found/{name.decode()}")
    if node is not None:
        return node
    node = Attributes(
        ino=ino,
        kind=NodeKind.FILE,
        mode=0o600,
        uid=folder.uid,
        gid=folder.gid,
        nlink=1,
        size=0,
        block_count=0,
        atime_ns=context.now_ns,
        mtime_ns=context.now_ns,
        ctime_ns=context.now_ns,
        btime_ns=context.now_ns,
        rdev=0,
        parent=0,
        data_version=1,
        placement=Placement(),
    )
    txn.set_state(b"node_count", txn.state(b"node_count") + 1)
    put_entry(txn, folder.ino, name, ino)
    txn.put_node(with_entry(folder, context, entries=1, subdirectories=0))
    context.changed_entry(folder.ino, name)
    return node


def _take(txn: Txn, context: Context, ino: int, extent: Extent) -> int:
    """Returns how many blocks the file has gained."""
    if not extent.tail_visible_bytes:
        raise InvalidError(f"inode {ino}: a block that shows nothing is not salvaged")
    places = {
        extents.place_at(txn, ino, block)
        for block in range(extent.file_block, extents.end_of(extent))
    }
    if places != {extents.HOLE}:
        if _has(txn, ino, extent, context.block_size_bytes):
            return 0
        raise ConflictError(
            f"inode {ino} has other blocks already at file blocks {extent.file_block} to "
            f"{extents.end_of(extent) - 1}"
        )
    for place in extent.replicas:
        stored = _region(txn, place.region)
        if not 0 < place.generation < txn.state(b"next_generation"):
            raise InvalidError(f"generation {place.generation} is none this salvage began with")
        if place.block + extent.block_count > stored.usable_blocks:
            raise TryAgainError(
                f"region {place.region} has {stored.usable_blocks} usable blocks so far: block "
                f"{place.block} is not yet among them"
            )
    if not space.take_salvaged(txn, ino, extent, context.block_size_bytes):
        raise ConflictError(f"inode {ino}: blocks at {extent.replicas} are another file's already")
    return extent.block_count


def _has(txn: Txn, ino: int, extent: Extent, block_size_bytes: int) -> bool:
    """Whether the file has these very blocks there (joined with others, perhaps)."""
    for known in extents.overlapping(txn, ino, extent.file_block, extents.end_of(extent)):
        if known.file_block <= extent.file_block and extents.end_of(extent) <= extents.end_of(
            known
        ):
            part = extents.cut(known, extent.file_block, extents.end_of(extent), block_size_bytes)
            return part == extent
    return False


def _region(txn: Txn, region: int) -> StoredRegion:
    value = txn.get(schema.REGIONS, schema.region_key(region))
    stored = None if value is None else schema.decode_region(value)
    if stored is None or not stored.unclaimed or stored.lost:
        raise InvalidError(f"region {region} is not one that holds blocks of a lost name space")
    return stored
