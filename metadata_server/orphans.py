"""Nodes without a name that somebody still has open: held by (inode, client) rows."""

from __future__ import annotations

from collections.abc import Iterable

from crailfs.records import DATA_KINDS, Attributes
from metadata_server import schema, space
from metadata_server.context import Context
from metadata_server.txn import Txn


def hold(txn: Txn, ino: int, clients: Iterable[int]) -> None:
    """Keep the unlinked node ``ino`` for each of ``clients`` until it releases it."""
    for client in clients:
        txn.put(schema.ORPHANS, schema.orphan_key(ino, client), b"")


def release(txn: Txn, context: Context, ino: int, client: int) -> bool:
    """``client`` no longer has ``ino`` open. True if it was the last one and the node is gone.

    A node that ``client`` does not hold is left alone, so that a release may come twice.
    """
    if not txn.delete(schema.ORPHANS, schema.orphan_key(ino, client)):
        return False
    if any(txn.scan_prefix(schema.ORPHANS, schema.node_key(ino))):
        return False
    free_node(txn, context, txn.node(ino))
    return True


def held_by(txn: Txn, client: int) -> list[int]:
    """The orphans that ``client`` holds, by a walk over all orphans."""
    return [
        ino
        for ino, holder in (schema.unpack_ino_block(key) for key, _ in txn.scan(schema.ORPHANS))
        if holder == client
    ]


def free_node(txn: Txn, context: Context, node: Attributes) -> None:
    """Remove a node that has neither name nor holder, with its xattrs and its extents."""
    if node.kind in DATA_KINDS and node.block_count:
        space.release_extents(txn, context, node.ino, 0)
    key = schema.node_key(node.ino)
    for xattr_key in [key for key, _ in txn.scan_prefix(schema.XATTRS, key)]:
        txn.delete(schema.XATTRS, xattr_key)
    txn.delete(schema.NODES, key)
    txn.set_state(b"node_count", txn.state(b"node_count") - 1)
