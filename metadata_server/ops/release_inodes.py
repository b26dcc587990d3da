"""The asking client has closed unlinked nodes."""

from __future__ import annotations

from crailfs.errors import InvalidError
from crailfs.limits import RENEW_MAX
from crailfs.wire.messages import Empty, ReleaseInodes
from metadata_server import orphans
from metadata_server.context import Context
from metadata_server.txn import Txn


def run(txn: Txn, request: ReleaseInodes, context: Context) -> Empty:
    if len(request.inodes) > RENEW_MAX:
        raise InvalidError(f"{len(request.inodes)} inodes in one release: at most {RENEW_MAX}")
    for ino in request.inodes:
        orphans.release(txn, context, ino, context.client_id)
    return Empty()
