"""The operations of the metadata server, one a module: ``run(txn, request, context) -> reply``.

An operation reads and writes tables and says in its context what it changed and what it showed. It
does no I/O and knows no connection; if it raises, the driver takes back all that it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crailfs.records import Record
from crailfs.wire.messages import Opcode
from metadata_server.context import Context
from metadata_server.ops import (
    begin_salvage,
    commit_file,
    create_node,
    end_salvage,
    fetch_header_changes,
    get_attributes,
    get_cluster_map,
    get_extents,
    get_statistics,
    get_xattr,
    grant_blocks,
    link_node,
    list_xattr,
    lookup,
    move_extent,
    put_key_value,
    read_directory,
    register_storage,
    release_inodes,
    remove_node,
    remove_xattr,
    rename_node,
    return_blocks,
    salvage_file,
    set_attributes,
    set_xattr,
    storage_heartbeat,
)
from metadata_server.txn import Txn

RUN: dict[Opcode, Callable[[Txn, Any, Context], Record]] = {
    Opcode.RELEASE_INODES: release_inodes.run,
    Opcode.LOOKUP: lookup.run,
    Opcode.GET_ATTRIBUTES: get_attributes.run,
    Opcode.SET_ATTRIBUTES: set_attributes.run,
    Opcode.CREATE_NODE: create_node.run,
    Opcode.REMOVE_NODE: remove_node.run,
    Opcode.RENAME_NODE: rename_node.run,
    Opcode.LINK_NODE: link_node.run,
    Opcode.READ_DIRECTORY: read_directory.run,
    Opcode.GET_XATTR: get_xattr.run,
    Opcode.SET_XATTR: set_xattr.run,
    Opcode.REMOVE_XATTR: remove_xattr.run,
    Opcode.LIST_XATTR: list_xattr.run,
    Opcode.GET_STATISTICS: get_statistics.run,
    Opcode.GET_EXTENTS: get_extents.run,
    Opcode.GRANT_BLOCKS: grant_blocks.run,
    Opcode.RETURN_BLOCKS: return_blocks.run,
    Opcode.COMMIT_FILE: commit_file.run,
    Opcode.PUT_KEY_VALUE: put_key_value.run,
    Opcode.MOVE_EXTENT: move_extent.run,
    Opcode.REGISTER_STORAGE: register_storage.run,
    Opcode.STORAGE_HEARTBEAT: storage_heartbeat.run,
    Opcode.GET_CLUSTER_MAP: get_cluster_map.run,
    Opcode.FETCH_HEADER_CHANGES: fetch_header_changes.run,
    Opcode.BEGIN_SALVAGE: begin_salvage.run,
    Opcode.SALVAGE_FILE: salvage_file.run,
    Opcode.END_SALVAGE: end_salvage.run,
}
"""What the driver runs for each opcode; the rest is answered by the server itself."""
