"""Clients' sessions: what a client holds, and how it is taken from one that has vanished.

A session's row outlives a restart of the server. When it expires, the client's grants wait in
``reclaim``; each storage server that has some of them is told to cut the client off, and when it
says that it has, the blocks there are free again. Until all have, the row stays, expired.
"""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.errors import InvalidError
from metadata_server import orphans, schema, space
from metadata_server.context import Context
from metadata_server.schema import Session
from metadata_server.txn import Txn

REQUEST_ID_END = (1 << 64) - 1


def find(txn: Txn, client_id: int) -> Session | None:
    """The client's row, live or expired."""
    value = txn.get(schema.SESSIONS, schema.session_key(client_id))
    return None if value is None else schema.decode_session(value)


def is_live(txn: Txn, client_id: int) -> bool:
    session = find(txn, client_id)
    return session is not None and not session.expired


def live_clients(txn: Txn) -> frozenset[int]:
    sessions = (schema.decode_session(value) for _, value in txn.scan(schema.SESSIONS))
    return frozenset(session.client for session in sessions if not session.expired)


def open_session(txn: Txn, client_id: int, host: str) -> bool:
    """The client has connected; True if it has no live session and so begins a new one.

    Storage servers that still have to cut off an earlier session of it do so all the same.
    """
    session = find(txn, client_id)
    if session is not None and not session.expired:
        return False
    if session is None:
        session = Session(client_id, host, completed_below=0)
    _put(txn, replace(session, host=host, completed_below=0, expired=False))
    return True


def expire(txn: Txn, context: Context, client_id: int) -> None:
    """The client has vanished: take everything that it holds."""
    session = find(txn, client_id)
    if session is None:
        return
    for ino in orphans.held_by(txn, client_id):
        orphans.release(txn, context, ino, client_id)
    forget_replies(txn, client_id, REQUEST_ID_END)
    pending = set(session.fence_pending)
    for region in space.reclaim_grants(txn, client_id):
        value = txn.get(schema.REGIONS, schema.region_key(region))
        if value is not None:
            pending.add(schema.decode_region(value).server_id)
    _put(txn, replace(session, fence_pending=tuple(sorted(pending)), expired=True))


def forget_replies(txn: Txn, client_id: int, completed_below: int) -> None:
    """The client has the replies to its requests with ids below ``completed_below``: it will not
    send them again."""
    if not 0 <= completed_below <= REQUEST_ID_END:
        raise InvalidError(f"{completed_below} is not a request id")
    first, end = schema.reply_key(client_id, 0), schema.reply_key(client_id, completed_below)
    for key in [key for key, _ in txn.scan(schema.REPLIES, first, end)]:
        txn.delete(schema.REPLIES, key)


def to_fence(txn: Txn, server_id: bytes) -> tuple[int, ...]:
    """The clients that the storage server still has to cut off."""
    sessions = (schema.decode_session(value) for _, value in txn.scan(schema.SESSIONS))
    return tuple(session.client for session in sessions if server_id in session.fence_pending)


def fenced(txn: Txn, client_id: int, server_id: bytes) -> None:
    """The client can no longer reach any block on the server by an old grant."""
    session = find(txn, client_id)
    if session is None or server_id not in session.fence_pending:
        return
    regions = (
        (schema.unpack_region(key), schema.decode_region(value))
        for key, value in txn.scan(schema.REGIONS)
    )
    own = frozenset(region for region, stored in regions if stored.server_id == server_id)
    space.free_fenced(txn, client_id, own)
    pending = tuple(other for other in session.fence_pending if other != server_id)
    _put(txn, replace(session, fence_pending=pending))


def _put(txn: Txn, session: Session) -> None:
    """An expired session that nobody has to be fenced for is forgotten."""
    key = schema.session_key(session.client)
    if session.expired and not session.fence_pending:
        txn.delete(schema.SESSIONS, key)
    else:
        txn.put(schema.SESSIONS, key, schema.encode(session))
