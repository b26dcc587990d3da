"""What client and servers both hold: nodes, extents, runs of blocks, servers.

All are MessagePack arrays (fields by position): a field is only ever added at the end, with a
default. The same structures travel on the wire and lie in LMDB.
"""

from __future__ import annotations

import enum
import stat

import msgspec

from crailfs.errors import InvalidError


class Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of all records: positional, immutable, compared by value."""


class NodeKind(enum.IntEnum):
    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7
    MULTIFILE = 8
    """A flat directory whose files read as one stream."""
    TABLE = 9
    """A flat directory of KEYVALUE nodes."""
    KEYVALUE = 10
    """A file that is replaced as a whole: the last put wins."""


FORMAT_BITS: dict[NodeKind, int] = {
    NodeKind.DIRECTORY: stat.S_IFDIR,
    NodeKind.FILE: stat.S_IFREG,
    NodeKind.SYMLINK: stat.S_IFLNK,
    NodeKind.FIFO: stat.S_IFIFO,
    NodeKind.SOCKET: stat.S_IFSOCK,
    NodeKind.CHARACTER_DEVICE: stat.S_IFCHR,
    NodeKind.BLOCK_DEVICE: stat.S_IFBLK,
    NodeKind.MULTIFILE: stat.S_IFDIR,
    NodeKind.TABLE: stat.S_IFDIR,
    NodeKind.KEYVALUE: stat.S_IFREG,
}
"""What ``st_mode`` shows for each kind of node."""

DIRECTORY_KINDS = frozenset({NodeKind.DIRECTORY, NodeKind.MULTIFILE, NodeKind.TABLE})
DATA_KINDS = frozenset({NodeKind.FILE, NodeKind.KEYVALUE})


class Tier(enum.IntEnum):
    """Media by speed; a block falls through from a lower number to a higher one."""

    PMEM = 0
    MEMORY = 1
    NVME = 2
    DISK = 3


class Durability(enum.IntEnum):
    """When a file's data is made as durable as its tier can: at fsync, or at each close too."""

    FSYNC = 0
    CLOSE = 1


class StorageClass(Record, frozen=True):
    """The tiers that may hold a node's blocks: from ``first`` down to ``last``, in that order."""

    first: Tier = Tier.PMEM
    last: Tier = Tier.DISK

    def __str__(self) -> str:
        if self == ANY_TIER:
            return "any"
        first, last = self.first.name.lower(), self.last.name.lower()
        return first if first == last else f"{first}>{last}"

    @classmethod
    def parse(cls, text: str) -> StorageClass:
        """``any``, ``memory`` (only there) or ``memory>disk`` (falls through down to disk)."""
        if text == "any":
            return ANY_TIER
        try:
            tiers = [Tier[part.strip().upper()] for part in text.split(">")]
        except KeyError:
            tiers = []
        if not 1 <= len(tiers) <= 2 or tiers[0] > tiers[-1]:
            names = ", ".join(tier.name.lower() for tier in Tier)
            raise InvalidError(
                f"storage class {text!r}: expected 'any', a tier ({names}) or 'tier>slower tier'"
            )
        return cls(tiers[0], tiers[-1])


ANY_TIER = StorageClass()


class Placement(Record, frozen=True):
    """How a node's data is stored; a directory's is inherited by what is created in it."""

    storage_class: StorageClass = ANY_TIER
    location: str = ""
    """The host or rack whose storage servers are preferred; empty: the writer's own host."""
    durability: Durability = Durability.FSYNC
    allocation_blocks: int = 1
    """Blocks that are taken at once and, where there are any, next to each other, for a file that
    grows (shown as ``user.crail.block_size``, in bytes: this times the cluster's block size)."""
    replicas: int = 1
    pinned: bool = False
    """Whether the mover leaves the node's blocks where they are."""
    ttl_s: int = 0
    """Seconds without use after which the node is removed; 0: never."""
    ttl_is_own: bool = False
    """Whether ``ttl_s`` was set on this very node: a directory then stays, however old it is."""


class Attributes(Record, frozen=True):
    """One node of the name space. Times are nanoseconds since the epoch and may be negative."""

    ino: int
    kind: NodeKind
    mode: int
    """Permission, set-id and sticky bits only (07777); the kind gives the rest of ``st_mode``."""
    uid: int
    gid: int
    nlink: int
    size: int
    """Bytes of a file; length of a symlink's target; entries of a directory."""
    block_count: int
    """Blocks that the node's extents occupy, in cluster blocks."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int
    parent: int
    """A directory's parent (for ``..`` and for refusing a move into itself); 0 for the rest."""
    data_version: int
    """Changes whenever the bytes that a reader would see change."""
    placement: Placement
    target: bytes = b""
    """A symlink's target."""
    moves: int = 0
    """Changes whenever some of the node's blocks are moved to other places: with ``data_version``
    it tells whether a map of them still holds."""
    synced: bool = False
    """Whether somebody has asked for its bytes to outlive a power cut: from where they do, they
    are not moved to where they do not."""

    @property
    def st_mode(self) -> int:
        return FORMAT_BITS[self.kind] | self.mode

    @property
    def is_directory(self) -> bool:
        return self.kind in DIRECTORY_KINDS


class Location(Record, frozen=True):
    """Where one replica of a run of blocks lies."""

    region: int
    block: int
    generation: int
    """Of the grant that it was written under."""


class Extent(Record, frozen=True):
    """Blocks that are next to each other in their file and, in each replica, in their region.

    All blocks but the last are full. Of the last, ``tail_stored_bytes`` were written and are under
    its checksum; a reader sees ``tail_visible_bytes`` of them (fewer after a truncate) and zeros
    from there to the block's end.
    """

    file_block: int
    block_count: int
    tail_stored_bytes: int
    tail_visible_bytes: int
    replicas: tuple[Location, ...]
    checksums: bytes
    """XXH3-64 of each block's stored bytes, little-endian, 8 bytes a block."""


class Run(Record, frozen=True):
    """Blocks next to each other in one region, granted to a client under one generation."""

    region: int
    block: int
    block_count: int
    generation: int


class RegionInfo(Record, frozen=True):
    """A region as its storage server describes it when it registers."""

    uuid: bytes
    """16 bytes, from the region's superblock: the same after every restart."""
    tier: Tier
    block_size_bytes: int
    block_count: int
    durable: bool
    """Whether a flush makes bytes outlive a power cut: never true of memory."""
    label: str
    """For people: the path or device."""
    medium: str = ""
    """For people: what kind of device or file it is, such as ``devdax`` or ``file on tmpfs``."""
    keeps_headers: bool = False
    """Whether the region notes whose each block is: see ``BlockHeader``."""
    held_blocks: int = 0
    """How many blocks its headers say are some file's, at the time of registration."""
    header_sequence: int = 0
    """Of the last ``HeaderChange`` that is durable in it, at the time of registration."""


class BlockHeader(Record, frozen=True):
    """What a region itself knows of one block that is some file's."""

    block: int
    ino: int
    file_block: int
    generation: int
    """The sequence of the change that made it the file's: of two blocks for one place in a file,
    the one with the higher was committed later."""
    stored_bytes: int
    visible_bytes: int
    """As in ``Extent``, of this block."""
    checksum: int
    """XXH3-64 of the stored bytes."""


class HeaderChange(Record, frozen=True):
    """Blocks next to each other that became a file's, or that are no file's any more."""

    region: int
    block: int
    block_count: int
    ino: int
    """0: the blocks are nobody's; the fields that follow mean nothing then."""
    file_block: int = 0
    generation: int = 0
    """As in ``BlockHeader``."""
    tail_stored_bytes: int = 0
    tail_visible_bytes: int = 0
    """Both of the last block; the others are full."""
    checksums: bytes = b""
    """As in ``Extent``."""


class PlacedRegion(Record, frozen=True):
    """A region as clients see it in the cluster map."""

    id: int
    server_id: bytes
    info: RegionInfo
    unclaimed: bool = False
    """Whether it holds blocks of a name space that this one is not: nothing is granted there."""


class StorageServerInfo(Record, frozen=True):
    id: bytes
    """16 bytes, kept in the server's state directory."""
    host: str
    rack: str
    unix_path: str
    """Where clients of the same host get the regions' file descriptors; empty: not offered."""
    tcp_host: str
    tcp_port: int
    boot_id: str
    """The kernel's boot id: a client with the same one is on the same host."""
    alive: bool = True
    seconds_since_heard: float = 0.0
    rdma: bool = False
    """Whether ``ConnectQueuePair`` is answered over TCP."""
