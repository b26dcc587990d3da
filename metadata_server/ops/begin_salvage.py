"""This name space, which is new, takes over what was stored in the time of a lost one."""

from __future__ import annotations

from crailfs.errors import ExistsError, InvalidError, NotEmptyError
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import BeginSalvage, CreateNode, Empty
from metadata_server.context import Context
from metadata_server.ops import create_node
from metadata_server.txn import Txn

LOST_AND_FOUND = b"lost+found"
_NUMBER_MAX = 1 << 63


def run(txn: Txn, request: BeginSalvage, context: Context) -> Empty:
    """Makes /lost+found, for its owner alone. May be repeated.

    NotEmptyError: something was stored or granted here already, whose numbers may be those of what
    is to be salvaged. ExistsError: /lost+found is not a directory.
    """
    for number in (request.next_ino, request.next_generation):
        if not 1 <= number <= _NUMBER_MAX:
            raise InvalidError(f"{number} is no inode or generation")
    next_ino, next_generation = txn.state(b"next_ino"), txn.state(b"next_generation")
    is_new = next_ino == ROOT_INODE + 1 and next_generation == 1
    if not is_new and not txn.state(b"salvaging"):
        raise NotEmptyError(
            "this name space has been used: files can be salvaged only into a new one. Stop the "
            "metadata server, give it an empty state directory and the cluster's id, and salvage "
            "before anything is written"
        )
    txn.set_state(b"salvaging", True)
    txn.set_state(b"next_ino", max(next_ino, request.next_ino))
    txn.set_state(b"next_generation", max(next_generation, request.next_generation))
    root = txn.node(ROOT_INODE)
    made = create_node.run(
        txn,
        CreateNode(
            parent=ROOT_INODE,
            name=LOST_AND_FOUND,
            kind=NodeKind.DIRECTORY,
            mode=0o700,
            uid=root.uid,
            gid=root.gid,
            exclusive=False,
        ),
        context,
    )
    if made.attributes.kind is not NodeKind.DIRECTORY:
        raise ExistsError("/lost+found is no plain directory: rename it")
    return Empty()
