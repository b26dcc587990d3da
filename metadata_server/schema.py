"""The authority on what the metadata server stores: each table's key, value, meaning, invariant
and keeper. ``audit.py`` checks the invariants; nothing else knows a table's bytes.

All integers in keys are big-endian, so that LMDB's byte order is numeric order. Values are
MessagePack records (``crailfs.records`` where the wire has the same thing). One named LMDB
database a table.

    table      key                              value
    ---------  -------------------------------  --------------------------------------------------
    state      name (ASCII)                     MessagePack scalar
    nodes      ino u64                          Attributes
    entries    parent ino u64, name bytes       ino u64 (big-endian)
    extents    ino u64, file block u64          Extent
    xattrs     ino u64, name bytes              bytes
    free       region u32, block u64            block count u64
    grants     client u64, region u32, block u64   Granted
    reclaim    sequence u64, region u32, block u64   Granted
    orphans    ino u64, client u64              empty
    sessions   client u64                       Session
    replies    client u64, request id u64       opcode u16 (big-endian), reply
    servers    server id 16 B                   StoredServer
    regions    region u32                       StoredRegion
    usage      region u32                       Usage
    header_log region u32, sequence u64         HeaderChange

Invariants
    I1  Every block of every region below its ``usable_blocks`` is in exactly one of: ``free``; one
        extent's replica; ``grants``; ``reclaim``; a row of ``header_log`` that says that it is
        nobody's; the region's ``failed`` list. Kept by ops that take or give space, through
        ``space.py`` alone.
    I2  ``free`` runs of one region neither overlap nor touch.
    I3  Every entry's ino is in ``nodes``; every node but the root and the orphans has as many
        entries as its ``nlink`` says (directories: one entry; nlink = 2 + number of child
        directories). Kept by the name space ops.
    I4  A node in ``orphans`` has nlink 0, and a node with nlink 0 is in ``orphans``.
    I5  A directory's ``size`` is its number of entries; its ``parent`` holds it.
    I6  A node's ``block_count`` is the sum of its extents' block counts; extents of one node do not
        overlap; checksums are 8 bytes a block; nothing visible lies beyond ``size``.
    I7  A MULTIFILE's entries are FILEs; a TABLE's are KEYVALUEs, and KEYVALUEs are nowhere else.
    I8  Every grant's client is in ``sessions``.
    I9  A region's ``usage`` row says what its ``free`` and ``reclaim`` rows and the blocks that
        wait in ``header_log`` add up to. Kept by ``space.py``.
    I10 ``header_log`` has rows only of regions that keep headers and, for blocks that are nobody's
        and wait for the journal's sync, of other durable ones, with sequences below
        ``next_header_change``; nothing is granted in an unclaimed region, and no file has blocks
        there but those that a salvage found.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from crailfs.records import (
    Attributes,
    Extent,
    HeaderChange,
    Record,
    RegionInfo,
    StorageServerInfo,
)

FORMAT_VERSION: Final = 2
"""In ``state`` under ``format_version``; a newer one is refused with what to do. Version 1 had
neither ``header_log`` nor its state."""

STATE: Final = b"state"
NODES: Final = b"nodes"
ENTRIES: Final = b"entries"
EXTENTS: Final = b"extents"
XATTRS: Final = b"xattrs"
FREE: Final = b"free"
GRANTS: Final = b"grants"
RECLAIM: Final = b"reclaim"
ORPHANS: Final = b"orphans"
SESSIONS: Final = b"sessions"
REPLIES: Final = b"replies"
SERVERS: Final = b"servers"
REGIONS: Final = b"regions"
USAGE: Final = b"usage"
HEADER_LOG: Final = b"header_log"

TABLES: Final = (
    STATE, NODES, ENTRIES, EXTENTS, XATTRS, FREE, GRANTS, RECLAIM, ORPHANS, SESSIONS, REPLIES,
    SERVERS, REGIONS, USAGE, HEADER_LOG,
)  # fmt: skip
"""In the order of their numbers in the journal: only ever appended to."""

STATE_KEYS: Final = (
    b"format_version",  # int
    b"cluster_id",  # 16 bytes
    b"block_size_bytes",  # int; fixed when the name space is made
    b"epoch",  # int; +1 at each start
    b"next_ino",  # int; never reused
    b"next_generation",  # int; of grants, never reused
    b"next_region",  # int
    b"next_reclaim",  # int; sequence of reclaim entries
    b"next_header_change",  # int; sequence of header_log, above all that any region has applied
    b"salvaging",  # bool; whether files of a lost name space may be put into this one
    b"journal_sequence",  # int; the last journal record that this LMDB state contains
    b"node_count",  # int; rows of nodes, orphans included
    b"clean",  # bool; False while a server is running
)


class Granted(Record, frozen=True):
    """Blocks that a client may be writing, or that wait to be free again."""

    block_count: int
    generation: int
    client: int
    """Who may still write there (reclaim: 0 when nobody can)."""


class Session(Record, frozen=True):
    client: int
    host: str
    completed_below: int
    """Request ids below this are answered and forgotten."""
    fence_pending: tuple[bytes, ...] = ()
    """Storage servers that have not yet said that they cut this expired client off; the row goes
    when it is empty."""
    expired: bool = False


class StoredServer(Record, frozen=True):
    info: StorageServerInfo


STALLED_NS: Final = 2_000_000_000


class StoredRegion(Record, frozen=True):
    info: RegionInfo
    server_id: bytes
    usable_blocks: int
    failed: tuple[int, ...] = ()
    lost: bool = False
    """The server came back without it."""
    full_since_ns: int = 0
    """When a heartbeat first found no free block and no growth; 0: the last one found some. After
    ``STALLED_NS`` the host has no memory for the rest of the region."""
    unclaimed: bool = False
    """It came with headers of blocks that a name space had that is not this one."""


class Usage(Record, frozen=True):
    """Sums over a region, so that nobody has to count rows."""

    free_blocks: int = 0
    reclaim_blocks: int = 0
    high_water_blocks: int = 0
    """One past the highest block ever handed out."""
    clearing_blocks: int = 0
    """No file's any more, which their headers do not say yet."""


_U64 = struct.Struct(">Q")
_INO_BLOCK = struct.Struct(">QQ")
_REGION = struct.Struct(">I")
_REGION_BLOCK = struct.Struct(">IQ")
_OWNER_REGION_BLOCK = struct.Struct(">QIQ")

node_key = _U64.pack
ino_value = _U64.pack
region_key = _REGION.pack
extent_key = _INO_BLOCK.pack
free_key = _REGION_BLOCK.pack
header_change_key = _REGION_BLOCK.pack
grant_key = _OWNER_REGION_BLOCK.pack
reclaim_key = _OWNER_REGION_BLOCK.pack
orphan_key = _INO_BLOCK.pack
session_key = _U64.pack
reply_key = _INO_BLOCK.pack


def entry_key(parent: int, name: bytes) -> bytes:
    return _U64.pack(parent) + name


def xattr_key(ino: int, name: bytes) -> bytes:
    return _U64.pack(ino) + name


def unpack_region(key: bytes) -> int:
    return int(_REGION.unpack(key)[0])


def unpack_u64(value: bytes) -> int:
    return int(_U64.unpack(value)[0])


def unpack_ino_block(key: bytes) -> tuple[int, int]:
    first, second = _INO_BLOCK.unpack(key)
    return first, second


def unpack_region_block(key: bytes) -> tuple[int, int]:
    region, block = _REGION_BLOCK.unpack(key)
    return region, block


def unpack_owner_region_block(key: bytes) -> tuple[int, int, int]:
    owner, region, block = _OWNER_REGION_BLOCK.unpack(key)
    return owner, region, block


encode = msgspec.msgpack.Encoder().encode
decode_attributes = msgspec.msgpack.Decoder(Attributes).decode
decode_extent = msgspec.msgpack.Decoder(Extent).decode
decode_granted = msgspec.msgpack.Decoder(Granted).decode
decode_session = msgspec.msgpack.Decoder(Session).decode
decode_server = msgspec.msgpack.Decoder(StoredServer).decode
decode_region = msgspec.msgpack.Decoder(StoredRegion).decode
decode_usage = msgspec.msgpack.Decoder(Usage).decode
decode_header_change = msgspec.msgpack.Decoder(HeaderChange).decode
decode_scalar = msgspec.msgpack.Decoder().decode
