"""Move a name, replacing what the new one names, or exchange two names."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from crailfs.errors import (
    ExistsError,
    InvalidError,
    IsADirectoryCrailError,
    NotADirectoryCrailError,
    NotEmptyError,
    NotPermittedError,
)
from crailfs.records import Attributes
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import RenameFlag, RenameNode, RenameReply
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.ops._names import check_name
from metadata_server.ops._nodes import (
    check_link_count,
    child,
    directory,
    drop_link,
    entry_node,
    kind_in,
    kind_name,
    put_entry,
    with_entry,
)
from metadata_server.txn import Txn


class _Place(NamedTuple):
    """One end of the move."""

    parent: Attributes
    name: bytes


def run(txn: Txn, request: RenameNode, context: Context) -> RenameReply:
    check_name(request.name)
    check_name(request.new_name)
    if request.flags not in (RenameFlag.NONE, RenameFlag.NO_REPLACE, RenameFlag.EXCHANGE):
        raise InvalidError("rename: NO_REPLACE and EXCHANGE exclude each other")
    old = _Place(directory(txn, request.parent), request.name)
    new = _Place(directory(txn, request.new_parent), request.new_name)
    node = child(txn, old.parent.ino, old.name)
    target_ino = txn.entry(new.parent.ino, new.name)
    if target_ino is None and request.flags is RenameFlag.EXCHANGE:
        child(txn, new.parent.ino, new.name)
    if target_ino is not None and request.flags is RenameFlag.NO_REPLACE:
        raise ExistsError(f"directory {new.parent.ino} already has an entry {new.name!r}")
    target = None
    if target_ino is not None:
        target = entry_node(txn, new.parent.ino, new.name, target_ino)
    _check_no_loop(txn, node, new.parent)
    context.shown += (node.ino, old.parent.ino, new.parent.ino)
    if target is not None and target.ino == node.ino:
        return RenameReply(node, 0, False, old.parent, new.parent)
    _check_kind(node, new.parent)
    if request.flags is RenameFlag.EXCHANGE:
        assert target is not None
        return _exchange(txn, context, node, target, old, new)
    return _move(txn, context, request, node, target, old, new)


def _move(
    txn: Txn,
    context: Context,
    request: RenameNode,
    node: Attributes,
    target: Attributes | None,
    old: _Place,
    new: _Place,
) -> RenameReply:
    directories = int(node.is_directory)
    replaced_ino, replaced_held = 0, False
    if target is not None:
        _check_replaceable(node, target)
        _, replaced_held = drop_link(txn, context, target, request.not_open)
        replaced_ino = target.ino
    txn.delete(schema.ENTRIES, schema.entry_key(old.parent.ino, old.name))
    put_entry(txn, new.parent.ino, new.name, node.ino)
    _put_parent(txn, context, old.parent.ino, entries=-1, subdirectories=-directories)
    if directories and target is None and new.parent.ino != old.parent.ino:
        check_link_count(new.parent)
    gained = 0 if target is not None else 1
    new_parent = _put_parent(
        txn, context, new.parent.ino, entries=gained, subdirectories=directories * gained
    )
    node = _put_moved(txn, context, node, new.parent)
    context.changed_entry(old.parent.ino, old.name)
    context.changed_entry(new.parent.ino, new.name)
    old_parent = txn.node(old.parent.ino)
    return RenameReply(node, replaced_ino, replaced_held, old_parent, new_parent)


def _exchange(
    txn: Txn,
    context: Context,
    node: Attributes,
    target: Attributes,
    old: _Place,
    new: _Place,
) -> RenameReply:
    _check_no_loop(txn, target, old.parent)
    _check_kind(target, old.parent)
    put_entry(txn, old.parent.ino, old.name, target.ino)
    put_entry(txn, new.parent.ino, new.name, node.ino)
    arriving = int(node.is_directory) - int(target.is_directory)
    if old.parent.ino != new.parent.ino and arriving:
        check_link_count(new.parent if arriving > 0 else old.parent)
    _put_parent(txn, context, old.parent.ino, entries=0, subdirectories=-arriving)
    new_parent = _put_parent(txn, context, new.parent.ino, entries=0, subdirectories=arriving)
    node = _put_moved(txn, context, node, new.parent)
    _put_moved(txn, context, target, old.parent)
    context.changed_entry(old.parent.ino, old.name)
    context.changed_entry(new.parent.ino, new.name)
    old_parent = txn.node(old.parent.ino)
    return RenameReply(node, 0, False, old_parent, new_parent)


def _check_no_loop(txn: Txn, node: Attributes, new_parent: Attributes) -> None:
    """InvalidError if ``new_parent`` is ``node`` or lies below it."""
    if not node.is_directory:
        return
    above = new_parent
    while True:
        if above.ino == node.ino:
            raise InvalidError(f"directory {node.ino} cannot be moved into itself")
        if above.ino == ROOT_INODE:
            return
        above = txn.node(above.parent)


def _check_kind(node: Attributes, parent: Attributes) -> None:
    if kind_in(parent, node.kind) is not node.kind:
        raise NotPermittedError(
            f"a {kind_name(node.kind)} cannot be in the {kind_name(parent.kind)} {parent.ino}"
        )


def _check_replaceable(node: Attributes, target: Attributes) -> None:
    if node.is_directory and not target.is_directory:
        raise NotADirectoryCrailError(
            f"inode {target.ino} is not a directory: directory {node.ino} cannot replace it"
        )
    if target.is_directory and not node.is_directory:
        raise IsADirectoryCrailError(f"inode {target.ino} is a directory: it cannot be replaced")
    if target.is_directory and target.size:
        raise NotEmptyError(f"directory {target.ino} has {target.size} entries")


def _put_parent(
    txn: Txn, context: Context, ino: int, *, entries: int, subdirectories: int
) -> Attributes:
    """Read anew, since both ends of a move may be in the same directory."""
    parent = with_entry(txn.node(ino), context, entries=entries, subdirectories=subdirectories)
    txn.put_node(parent)
    return parent


def _put_moved(txn: Txn, context: Context, node: Attributes, new_parent: Attributes) -> Attributes:
    node = replace(node, ctime_ns=context.now_ns, parent=new_parent.ino if node.is_directory else 0)
    txn.put_node(node)
    context.changed(node.ino)
    return node
