"""What the client remembers of nodes, each under a lease.

A node's lease runs ``LEASE_MS`` from the moment its last request was *sent*, so it ends here before
it ends at the metadata server. It is continued only by a reply that arrives while it still runs:
after a gap somebody may have changed the node without telling us.

A reply can be overtaken by a change: by an invalidation that the connection delivered right behind
it, or by another operation of this client whose task ran first. Each request therefore takes a
``ticket`` before it is sent, and what its reply shows is remembered only if the node has not
changed since.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from crailfs.client.block_map import BlockMap
from crailfs.limits import CLIENT_EXTENTS_CACHED_MAX, CLIENT_NODES_CACHED_MAX, RENEW_MAX
from crailfs.records import DATA_KINDS, Attributes

_CHANGES_REMEMBERED_MAX: Final = 16_384
_RENEWED_DIRECTORIES_MAX: Final = 1_024


def lease_clock() -> float:
    """Seconds; also counts while the host is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Ticket(NamedTuple):
    """When a request was sent: on the clock, and in the order of changes."""

    sent: float
    sequence: int
    connection: int


class Entry(NamedTuple):
    """What a lookup in the cache found: ``ino`` 0 says that the name does not exist."""

    ino: int


ABSENT: Final = Entry(0)


class Node:
    """One inode. The fields hold only while ``NodeCache.is_live``, except that ``blocks`` may be
    taken up again when fresh attributes show the version that it belongs to: ``blocks_version``."""

    __slots__ = (
        "attributes",
        "blocks",
        "blocks_version",
        "complete",
        "connection",
        "expires",
        "extents_counted",
        "ino",
        "names",
        "names_epoch",
        "pins",
        "stored_at",
    )

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.expires = 0.0
        self.connection = 0
        self.attributes: Attributes | None = None
        self.blocks: BlockMap | None = None
        self.blocks_version = (-1, -1)
        self.extents_counted = 0
        self.names: dict[bytes, Entry] = {}
        self.complete = False
        """Whether every name of this directory is in ``names``."""
        self.names_epoch = 0
        self.stored_at = 0
        """When ``attributes`` came, in the order of changes."""
        self.pins = 0
        """Open files: not evicted."""


class NodeCache:
    """Bounded by number of nodes and names together, and by number of extents; the least recently
    used goes first."""

    def __init__(
        self,
        lease_ms: int,
        *,
        nodes_max: int = CLIENT_NODES_CACHED_MAX,
        extents_max: int = CLIENT_EXTENTS_CACHED_MAX,
    ) -> None:
        self.lease_seconds = lease_ms / 1000
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._nodes_max = nodes_max
        self._extents_max = extents_max
        self._name_count = 0
        self._extent_count = 0
        self._sequence = 0
        self._connection = 1
        self._changed: dict[int | tuple[int, bytes], int] = {}
        self._changed_floor = 0
        self._recent_directories: set[int] = set()

    # --- leases -----------------------------------------------------------------------------

    def ticket(self) -> Ticket:
        return Ticket(lease_clock(), self._sequence, self._connection)

    def is_live(self, node: Node) -> bool:
        return node.connection == self._connection and node.expires > lease_clock()

    def lease_remaining_ms(self, ino: int) -> int:
        node = self._nodes.get(ino)
        if node is None or node.connection != self._connection:
            return 0
        return max(0, int((node.expires - lease_clock()) * 1000))

    def disconnect(self) -> None:
        """The connection broke: every lease ends."""
        self._connection += 1
        self._recent_directories.clear()

    def to_renew(self, open_inodes: Iterable[int]) -> list[Node]:
        """Whose leases are worth keeping: open files, directories used since the last call."""
        wanted = [*open_inodes, *self._recent_directories][:RENEW_MAX]
        self._recent_directories.clear()
        nodes = (self._nodes.get(ino) for ino in wanted)
        return [node for node in nodes if node is not None and self.is_live(node)]

    def renewed(self, nodes: Iterable[Node], ticket: Ticket) -> None:
        for node in nodes:
            if self._nodes.get(node.ino) is node and self.is_live(node):
                self._extend(node, ticket)

    def _extend(self, node: Node, ticket: Ticket) -> None:
        """The metadata server has shown ``node`` in answer to the request that has ``ticket``."""
        if ticket.connection != self._connection:
            return
        if not self.is_live(node):
            self._forget_names(node)
            node.attributes = None
            node.connection = ticket.connection
            node.expires = 0.0
        node.expires = max(node.expires, ticket.sent + self.lease_seconds)

    # --- reading ----------------------------------------------------------------------------

    def node(self, ino: int) -> Node | None:
        """The node if it is remembered under a lease."""
        node = self._nodes.get(ino)
        if node is None or not self.is_live(node):
            return None
        self._nodes.move_to_end(ino)
        return node

    def attributes(self, ino: int) -> Attributes | None:
        node = self.node(ino)
        return None if node is None else node.attributes

    def entry(self, parent: int, name: bytes) -> Entry | None:
        """``None``: not known; ``ABSENT``: known not to exist."""
        node = self.node(parent)
        if node is None:
            return None
        if len(self._recent_directories) < _RENEWED_DIRECTORIES_MAX:
            self._recent_directories.add(parent)
        entry = node.names.get(name)
        if entry is None and node.complete:
            return ABSENT
        return entry

    def blocks(self, node: Node) -> BlockMap | None:
        """The node's block map, if it belongs to its attributes as they are now."""
        if (
            node.blocks is None
            or node.attributes is None
            or node.blocks_version != _version(node.attributes)
        ):
            return None
        return node.blocks

    def blocks_before(
        self, node: Node, attributes: Attributes, *, data_changes: int
    ) -> BlockMap | None:
        """The node's block map, if ``attributes`` are what its own attributes became by one
        operation of this client that changed the data so many times, and by nothing else."""
        data_version, moves = _version(attributes)
        if node.blocks_version != (data_version - data_changes, moves):
            return None
        return self.blocks(node)

    # --- storing what replies showed --------------------------------------------------------

    def changed_since(self, key: int | tuple[int, bytes], ticket: Ticket) -> bool:
        return (
            ticket.connection != self._connection
            or ticket.sequence < self._changed_floor
            or self._changed.get(key, 0) > ticket.sequence
        )

    def store(
        self, attributes: Attributes, ticket: Ticket, *, changed: bool = False
    ) -> Node | None:
        """Remember ``attributes``. ``changed``: the reply is of an operation that changed them.

        ``None`` if they were overtaken, and then nothing of the node is trusted.
        """
        ino = attributes.ino
        overtaken = self.changed_since(ino, ticket)
        if changed:
            self._note_change(ino)
        if overtaken:
            if changed:
                self._drop_attributes(ino)
            return None
        node = self._node(ino)
        self._extend(node, ticket)
        self._sequence += 1
        node.stored_at = self._sequence
        node.attributes = attributes
        return node

    def store_new(self, attributes: Attributes, ticket: Ticket, block_size_bytes: int) -> None:
        """Remember a node that was just made: it is known to be empty."""
        node = self.store(attributes, ticket)
        if node is None:
            return
        if attributes.is_directory:
            node.complete = True
        elif attributes.kind in DATA_KINDS:
            self.set_blocks(node, BlockMap.empty_file(block_size_bytes))

    def directory_after(
        self, ino: int, ticket: Ticket, *, entries: int, subdirectories: int, time_ns: int
    ) -> Attributes | None:
        """A directory's attributes after an operation of this client that changed its entries, if
        they are known for sure: nothing else touched them since ``ticket``."""
        node = self.node(ino)
        if node is None or node.attributes is None:
            return None
        if node.stored_at > ticket.sequence or self.changed_since(ino, ticket):
            return None
        before = node.attributes
        return msgspec.structs.replace(
            before,
            size=before.size + entries,
            nlink=before.nlink + subdirectories,
            mtime_ns=time_ns,
            ctime_ns=time_ns,
        )

    def store_entry(self, parent: int, name: bytes, entry: Entry, ticket: Ticket) -> None:
        """A lookup answered this; the metadata server counts the directory as shown."""
        if self.changed_since((parent, name), ticket):
            self._forget_name(self._node(parent), name)
            return
        node = self._node(parent)
        self._extend(node, ticket)
        self._put_name(node, name, entry)

    def change_entries(
        self,
        parent: int,
        entries: Mapping[bytes, Entry | None],
        ticket: Ticket,
        attributes: Attributes | None,
    ) -> None:
        """An operation of this client made these names what ``entries`` says; ``None``: unknown.

        ``attributes`` are the directory's afterwards, where the reply shows them.
        """
        overtaken = {name for name in entries if self.changed_since((parent, name), ticket)}
        for name in entries:
            self._note_change((parent, name))
        if attributes is not None:
            self.store(attributes, ticket, changed=True)
        else:
            self._note_change(parent)
            self._drop_attributes(parent)
        node = self._nodes.get(parent)
        if node is None or not self.is_live(node):
            return
        for name, entry in entries.items():
            if entry is None or name in overtaken:
                self._forget_name(node, name)
            else:
                self._put_name(node, name, entry)

    def show(self, ino: int, ticket: Ticket) -> None:
        """The metadata server has shown the node, and counts this client as a lease holder."""
        self._extend(self._node(ino), ticket)

    def names_epoch(self, ino: int) -> int | None:
        """Changes whenever a name of this directory was forgotten; ``None``: not known at all."""
        node = self.node(ino)
        return None if node is None else node.names_epoch

    def set_complete(self, ino: int, names_epoch: int | None) -> None:
        """Every name of this directory has been stored since ``names_epoch``: those that are not
        here do not exist."""
        node = self.node(ino)
        if node is not None and node.names_epoch == names_epoch:
            node.complete = True

    def set_blocks(self, node: Node, blocks: BlockMap) -> None:
        """``blocks`` belongs to the attributes that ``node`` has now."""
        assert node.attributes is not None
        node.blocks = blocks
        node.blocks_version = _version(node.attributes)
        self.count_extents(node)

    def count_extents(self, node: Node) -> None:
        """To be called after a map was changed, so that the bound holds."""
        if self._nodes.get(node.ino) is not node:
            return
        count = node.blocks.extent_count if node.blocks is not None else 0
        self._extent_count += count - node.extents_counted
        node.extents_counted = count
        self._evict()

    # --- forgetting -------------------------------------------------------------------------

    def invalidate(self, ino: int, name: bytes = b"") -> None:
        """Somebody else changed the node, or the directory's entry ``name``."""
        self._note_change(ino)
        self._drop_attributes(ino)
        if name:
            self._note_change((ino, name))
            node = self._nodes.get(ino)
            if node is not None:
                self._forget_name(node, name)

    def drop_blocks(self, ino: int) -> None:
        """The map proved wrong."""
        node = self._nodes.get(ino)
        if node is not None:
            node.blocks = None
            self.count_extents(node)

    def forget(self, ino: int) -> None:
        """The node is gone, or nothing that is remembered of it can be trusted."""
        self._note_change(ino)
        node = self._nodes.get(ino)
        if node is None:
            return
        node.attributes = None
        node.blocks = None
        node.expires = 0.0
        self._forget_names(node)
        self.count_extents(node)
        if not node.pins:
            self._remove(node)

    def pin(self, ino: int) -> Node:
        node = self._node(ino)
        node.pins += 1
        return node

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._evict()

    def _note_change(self, key: int | tuple[int, bytes]) -> None:
        self._sequence += 1
        if len(self._changed) >= _CHANGES_REMEMBERED_MAX:
            self._changed.clear()
            self._changed_floor = self._sequence
        self._changed[key] = self._sequence

    def _drop_attributes(self, ino: int) -> None:
        node = self._nodes.get(ino)
        if node is not None:
            node.attributes = None

    def _node(self, ino: int) -> Node:
        node = self._nodes.get(ino)
        if node is None:
            node = self._nodes[ino] = Node(ino)
            self._evict()
        else:
            self._nodes.move_to_end(ino)
        return node

    def _put_name(self, node: Node, name: bytes, entry: Entry) -> None:
        if name not in node.names:
            self._name_count += 1
        node.names[name] = entry
        self._evict()

    def _forget_name(self, node: Node, name: bytes) -> None:
        node.complete = False
        node.names_epoch += 1
        if node.names.pop(name, None) is not None:
            self._name_count -= 1

    def _forget_names(self, node: Node) -> None:
        self._name_count -= len(node.names)
        node.names = {}
        node.names_epoch += 1
        node.complete = False

    def _remove(self, node: Node) -> None:
        del self._nodes[node.ino]
        self._name_count -= len(node.names)
        self._extent_count -= node.extents_counted

    def _evict(self) -> None:
        tries = len(self._nodes)
        while tries and (
            len(self._nodes) + self._name_count > self._nodes_max
            or self._extent_count > self._extents_max
        ):
            tries -= 1
            ino, node = next(iter(self._nodes.items()))
            self._forget_names(node)
            if node.pins:
                node.blocks = None
                self._extent_count -= node.extents_counted
                node.extents_counted = 0
                self._nodes.move_to_end(ino)
            else:
                self._remove(node)


def _version(attributes: Attributes) -> tuple[int, int]:
    """What a map of the node's blocks belongs to."""
    return attributes.data_version, attributes.moves
