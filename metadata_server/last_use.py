"""When a node with a time to live was last used, and so when it is due."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from crailfs.records import Attributes
from crailfs.units import NANOSECONDS_PER_SECOND
from metadata_server.context import Context
from metadata_server.txn import Txn

_NOTED_PARTS: Final = 8


def note_use(txn: Txn, context: Context, node: Attributes) -> Attributes:
    """The node is being read or is open. If it has a time to live, say so in its ``atime``, unless
    that says nearly the same already; returns the node as it is then.

    Clients are not told: that the time they remember is a little old does no harm.
    """
    ttl_ns = node.placement.ttl_s * NANOSECONDS_PER_SECOND
    if not ttl_ns:
        return node
    is_noted = node.atime_ns > max(node.mtime_ns, node.ctime_ns)
    if is_noted and context.now_ns - node.atime_ns < ttl_ns // _NOTED_PARTS:
        return node
    node = replace(node, atime_ns=context.now_ns)
    txn.put_node(node)
    return node


def due_ns(node: Attributes, idle_min_ns: int) -> int:
    """When the node, which has a time to live, can be removed if nobody uses it any more."""
    ttl_ns = node.placement.ttl_s * NANOSECONDS_PER_SECOND
    changed_ns = max(node.mtime_ns, node.ctime_ns)
    if node.atime_ns > changed_ns:
        return node.atime_ns + max(idle_min_ns, ttl_ns + ttl_ns // _NOTED_PARTS)
    return changed_ns + max(idle_min_ns, ttl_ns)
