"""What several name space operations do with nodes and entries."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import (
    DamagedError,
    InvalidError,
    NotADirectoryCrailError,
    NotFoundError,
    NotPermittedError,
    TooManyLinksError,
)
from crailfs.limits import LINK_COUNT_MAX
from crailfs.records import DIRECTORY_KINDS, Attributes, NodeKind
from metadata_server import orphans, schema
from metadata_server.context import Context
from metadata_server.txn import Txn

ID_MAX = (1 << 32) - 2
"""Of a user or group; the number above means *unchanged* to the kernel."""
TIME_LIMIT_NS = 1 << 63


def directory(txn: Txn, ino: int) -> Attributes:
    """The directory or container ``ino``, in which entries can be made.

    Raises NotADirectoryCrailError, StaleError if it is gone, and NotFoundError if it was removed
    and lives on only because somebody has it open.
    """
    node = txn.node(ino)
    if node.kind not in DIRECTORY_KINDS:
        raise NotADirectoryCrailError(f"inode {ino} is a {kind_name(node.kind)}, not a directory")
    if node.nlink == 0:
        raise NotFoundError(f"directory {ino} has been removed")
    return node


def child(txn: Txn, parent: int, name: bytes) -> Attributes:
    """The node that ``name`` in ``parent`` points to; NotFoundError if there is none."""
    ino = txn.entry(parent, name)
    if ino is None:
        raise NotFoundError(f"directory {parent} has no entry {name!r}")
    return entry_node(txn, parent, name, ino)


def entry_node(txn: Txn, parent: int, name: bytes, ino: int) -> Attributes:
    """The node that an entry points to, which must be there (invariant I3)."""
    node = txn.find_node(ino)
    if node is None:
        raise DamagedError(
            f"entry {name!r} of directory {parent} points to inode {ino}, which does not exist: "
            f"run 'crail fsck'"
        )
    return node


def kind_name(kind: NodeKind) -> str:
    return kind.name.lower().replace("_", " ")


def kind_in(parent: Attributes, kind: NodeKind) -> NodeKind:
    """The kind that a node of ``kind`` has in ``parent``; NotPermittedError if it cannot be there.

    A multifile holds files, a table key-values (a file made in a table becomes one), and neither
    can be nested.
    """
    if parent.kind is NodeKind.TABLE and kind in (NodeKind.FILE, NodeKind.KEYVALUE):
        return NodeKind.KEYVALUE
    if parent.kind is NodeKind.MULTIFILE and kind is NodeKind.FILE:
        return kind
    if parent.kind is NodeKind.DIRECTORY and kind is not NodeKind.KEYVALUE:
        return kind
    raise NotPermittedError(
        f"a {kind_name(kind)} cannot be in the {kind_name(parent.kind)} {parent.ino}"
    )


def check_link_count(node: Attributes) -> None:
    if node.nlink >= LINK_COUNT_MAX:
        raise TooManyLinksError(f"inode {node.ino} has {node.nlink} links, the most possible")


def check_owner(uid: int | None, gid: int | None) -> None:
    for what, value in (("user", uid), ("group", gid)):
        if value is not None and not 0 <= value <= ID_MAX:
            raise InvalidError(f"{what} id {value} is not between 0 and {ID_MAX}")


def with_entry(
    parent: Attributes, context: Context, *, entries: int, subdirectories: int
) -> Attributes:
    """``parent`` after its entries changed by so many, of which so many are directories."""
    return replace(
        parent,
        size=parent.size + entries,
        nlink=parent.nlink + subdirectories,
        mtime_ns=context.now_ns,
        ctime_ns=context.now_ns,
    )


def drop_link(txn: Txn, context: Context, node: Attributes, not_open: int) -> tuple[int, bool]:
    """One name of ``node`` has gone: free it, or leave it to those who may have it open.

    ``not_open`` is the inode that the asking client knows not to have open. Returns the links that
    are left, and whether the asking client now holds the node as an orphan.
    """
    nlink = 0 if node.is_directory else node.nlink - 1
    if nlink:
        txn.put_node(replace(node, nlink=nlink, ctime_ns=context.now_ns))
        context.changed(node.ino)
        return nlink, False
    client = context.client_id
    held = client != 0 and not_open != node.ino
    holders = context.holders(node.ino)
    if held:
        holders |= {client}
    if not holders:
        orphans.free_node(txn, context, node)
        return 0, False
    txn.put_node(replace(node, nlink=0, ctime_ns=context.now_ns))
    orphans.hold(txn, node.ino, sorted(holders))
    context.unlinked(node.ino)
    return 0, held


def put_entry(txn: Txn, parent: int, name: bytes, ino: int) -> None:
    txn.put(schema.ENTRIES, schema.entry_key(parent, name), schema.ino_value(ino))
