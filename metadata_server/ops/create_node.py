"""Make a node of any kind in a directory or container."""

from __future__ import annotations

import stat

from msgspec.structs import replace

from crailfs.errors import ExistsError, InvalidError, IsADirectoryCrailError, NameTooLongError
from crailfs.limits import (
    GRANT_BLOCKS_MAX,
    LOCATION_MAX_BYTES,
    SYMLINK_MAX_BYTES,
    TTL_MAX_S,
)
from crailfs.records import DIRECTORY_KINDS, Attributes, NodeKind, Placement
from crailfs.wire.messages import CreateNode, CreateReply
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._names import check_name
from metadata_server.ops._nodes import (
    check_link_count,
    check_owner,
    directory,
    entry_node,
    kind_in,
    put_entry,
    with_entry,
)
from metadata_server.txn import Txn

_DEVICES = (NodeKind.CHARACTER_DEVICE, NodeKind.BLOCK_DEVICE)


def run(txn: Txn, request: CreateNode, context: Context) -> CreateReply:
    check_name(request.name)
    check_owner(request.uid, request.gid)
    parent = directory(txn, request.parent)
    context.shown.append(parent.ino)
    existing = txn.entry(parent.ino, request.name)
    if existing is not None:
        return _existing(txn, request, context, existing)
    kind = kind_in(parent, request.kind)
    is_directory = kind in DIRECTORY_KINDS
    if is_directory:
        check_link_count(parent)
    node = _new_node(txn, request, context, parent, kind)
    ino = node.ino
    txn.append(schema.NODES, schema.node_key(ino), schema.encode(node))
    txn.set_state(b"node_count", txn.state(b"node_count") + 1)
    put_entry(txn, parent.ino, request.name, ino)
    txn.put_node(with_entry(parent, context, entries=1, subdirectories=int(is_directory)))
    context.changed_entry(parent.ino, request.name)
    context.shown.append(ino)
    return CreateReply(node, True)


def _existing(txn: Txn, request: CreateNode, context: Context, ino: int) -> CreateReply:
    node = entry_node(txn, request.parent, request.name, ino)
    wants_directory = request.kind in DIRECTORY_KINDS
    if request.exclusive or (wants_directory and not node.is_directory):
        raise ExistsError(f"directory {request.parent} already has an entry {request.name!r}")
    if node.is_directory and not wants_directory:
        raise IsADirectoryCrailError(f"{request.name!r} in {request.parent} is a directory")
    context.shown.append(ino)
    return CreateReply(node, False)


def _new_node(
    txn: Txn, request: CreateNode, context: Context, parent: Attributes, kind: NodeKind
) -> Attributes:
    is_directory = kind in DIRECTORY_KINDS
    mode, gid = stat.S_IMODE(request.mode), request.gid
    if parent.mode & stat.S_ISGID:
        gid = parent.gid
        if is_directory:
            mode |= stat.S_ISGID
    now_ns = context.now_ns
    target = _target(request, kind)
    return Attributes(
        ino=txn.next_counter(b"next_ino"),
        kind=kind,
        mode=mode,
        uid=request.uid,
        gid=gid,
        nlink=2 if is_directory else 1,
        size=len(target),
        block_count=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        rdev=request.rdev if kind in _DEVICES else 0,
        parent=parent.ino if is_directory else 0,
        data_version=1,
        placement=_placement(request, parent.placement),
        target=target,
    )


def _target(request: CreateNode, kind: NodeKind) -> bytes:
    target = request.target
    if kind is not NodeKind.SYMLINK:
        if target:
            raise InvalidError(f"{request.name!r}: only a symlink has a target")
    elif len(target) > SYMLINK_MAX_BYTES:
        raise NameTooLongError(
            f"symlink target of {len(target)} bytes: at most {SYMLINK_MAX_BYTES} are possible"
        )
    elif not target or b"\0" in target:
        raise InvalidError(f"symlink target {target[:32]!r}: not empty and without NUL, please")
    return target


def _placement(request: CreateNode, inherited: Placement) -> Placement:
    named = {
        "storage_class": request.storage_class,
        "location": request.location,
        "durability": request.durability,
        "allocation_blocks": request.allocation_blocks,
    }
    chosen = {name: value for name, value in named.items() if value is not None}
    if inherited.ttl_is_own:
        inherited = replace(inherited, ttl_is_own=False)
    if not chosen:
        return inherited
    placement: Placement = replace(inherited, **chosen)
    check_placement(placement)
    return placement


def check_placement(placement: Placement) -> None:
    """Raise InvalidError if no data could be stored like this."""
    if placement.storage_class.first > placement.storage_class.last:
        raise InvalidError("storage class: its first tier is slower than its last")
    if len(placement.location.encode()) > LOCATION_MAX_BYTES:
        raise InvalidError(f"location: at most {LOCATION_MAX_BYTES} bytes")
    if not 1 <= placement.allocation_blocks <= GRANT_BLOCKS_MAX:
        raise InvalidError(
            f"allocation of {placement.allocation_blocks} blocks: between 1 and {GRANT_BLOCKS_MAX}"
        )
    if not 0 <= placement.ttl_s <= TTL_MAX_S:
        raise InvalidError(f"time to live of {placement.ttl_s} s: at most {TTL_MAX_S}")
    if placement.replicas != 1:
        raise InvalidError(
            f"{placement.replicas} replicas: this version keeps exactly one copy of each block"
        )
