"""Every message of the protocol: opcode, request, reply.

A request is a MessagePack array of its fields; its reply is the array of the reply type, or an
error frame whose status is ``CrailError.wire_code`` and whose body is one string. The opcode's
row in ``OPERATIONS`` says which types belong together, whether the request changes state (then
the server answers a replayed one from memory, exactly once), and whether a payload follows.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from crailfs.records import (
    Attributes,
    Durability,
    Extent,
    NodeKind,
    Record,
    Run,
    StorageClass,
)
from crailfs.wire.storage_messages import (
    Access as Access,
)
from crailfs.wire.storage_messages import (
    AttachedRegion as AttachedRegion,
)
from crailfs.wire.storage_messages import (
    AttachRegions as AttachRegions,
)
from crailfs.wire.storage_messages import (
    AttachReply as AttachReply,
)
from crailfs.wire.storage_messages import (
    Audit as Audit,
)
from crailfs.wire.storage_messages import (
    AuditReply as AuditReply,
)
from crailfs.wire.storage_messages import (
    BeginSalvage as BeginSalvage,
)
from crailfs.wire.storage_messages import (
    ClientConnection as ClientConnection,
)
from crailfs.wire.storage_messages import (
    ClusterMap as ClusterMap,
)
from crailfs.wire.storage_messages import (
    ConnectQueuePair as ConnectQueuePair,
)
from crailfs.wire.storage_messages import (
    EndSalvage as EndSalvage,
)
from crailfs.wire.storage_messages import (
    FetchHeaderChanges as FetchHeaderChanges,
)
from crailfs.wire.storage_messages import (
    FlushMethod as FlushMethod,
)
from crailfs.wire.storage_messages import (
    FlushRegion as FlushRegion,
)
from crailfs.wire.storage_messages import (
    FlushReply as FlushReply,
)
from crailfs.wire.storage_messages import (
    FlushRung as FlushRung,
)
from crailfs.wire.storage_messages import (
    GetClusterMap as GetClusterMap,
)
from crailfs.wire.storage_messages import (
    GetStatistics as GetStatistics,
)
from crailfs.wire.storage_messages import (
    GetStatus as GetStatus,
)
from crailfs.wire.storage_messages import (
    HeaderChanges as HeaderChanges,
)
from crailfs.wire.storage_messages import (
    HeaderPage as HeaderPage,
)
from crailfs.wire.storage_messages import (
    HeartbeatReply as HeartbeatReply,
)
from crailfs.wire.storage_messages import (
    Move as Move,
)
from crailfs.wire.storage_messages import (
    MoveExtent as MoveExtent,
)
from crailfs.wire.storage_messages import (
    Moves as Moves,
)
from crailfs.wire.storage_messages import (
    NextMoves as NextMoves,
)
from crailfs.wire.storage_messages import (
    QueuePairEnd as QueuePairEnd,
)
from crailfs.wire.storage_messages import (
    QueuePairReply as QueuePairReply,
)
from crailfs.wire.storage_messages import (
    ReadBlocks as ReadBlocks,
)
from crailfs.wire.storage_messages import (
    ReadHeaders as ReadHeaders,
)
from crailfs.wire.storage_messages import (
    RegionState as RegionState,
)
from crailfs.wire.storage_messages import (
    RegionUse as RegionUse,
)
from crailfs.wire.storage_messages import (
    RegisterReply as RegisterReply,
)
from crailfs.wire.storage_messages import (
    RegisterStorage as RegisterStorage,
)
from crailfs.wire.storage_messages import (
    RemoteRegion as RemoteRegion,
)
from crailfs.wire.storage_messages import (
    ReportFailed as ReportFailed,
)
from crailfs.wire.storage_messages import (
    SalvageFile as SalvageFile,
)
from crailfs.wire.storage_messages import (
    Statistics as Statistics,
)
from crailfs.wire.storage_messages import (
    Status as Status,
)
from crailfs.wire.storage_messages import (
    StorageHeartbeat as StorageHeartbeat,
)
from crailfs.wire.storage_messages import (
    StorageStatus as StorageStatus,
)
from crailfs.wire.storage_messages import (
    StorageStatusReply as StorageStatusReply,
)
from crailfs.wire.storage_messages import (
    TierStatistics as TierStatistics,
)
from crailfs.wire.storage_messages import (
    WriteBlocks as WriteBlocks,
)

Message = Record
"""A message body is a record: some replies are just one (``Attributes``)."""


class Empty(Message, frozen=True):
    pass


# --- connection ---------------------------------------------------------------------------------


class Role(enum.IntEnum):
    CLIENT = 1
    STORAGE_SERVER = 2
    METADATA_SERVER = 3
    OPERATOR = 4
    """Status, fsck: no session, no lease."""


class Hello(Message, frozen=True):
    """First frame of whoever connects."""

    version: int
    role: Role
    client_id: int
    nonce: bytes
    """32 random bytes."""
    cluster_id: bytes
    """16 bytes; empty: whichever cluster answers (the secret still has to match)."""


class Challenge(Message, frozen=True):
    version: int
    cluster_id: bytes
    server_epoch: int
    """Grows by one each time the server starts."""
    nonce: bytes
    proof: bytes
    """HMAC-SHA256 of both nonces and both identities under the cluster's secret."""


class Proof(Message, frozen=True):
    proof: bytes


class Welcome(Message, frozen=True):
    session_is_new: bool
    """True: the server knew no live session of this client, so grants and leases are gone."""
    lease_ms: int


# --- session ------------------------------------------------------------------------------------


class KeepAlive(Message, frozen=True):
    completed_below: int
    """Every request with a lower id has been answered: remembered replies may go."""
    renew: tuple[int, ...]
    """Inodes that are open: their leases are extended."""


class KeepAliveReply(Message, frozen=True):
    gone: tuple[int, ...]
    """Of ``renew``: nodes that no longer exist."""


class EndSession(Message, frozen=True):
    """The client ends and has nothing under way: what it holds is taken back at once, instead of
    after a silence."""


class Invalidation(Message, frozen=True):
    ino: int
    name: bytes
    """The directory entry that changed; empty: the node itself."""
    removed: bool
    """The node has lost its last name; say in the answer whether it is open here."""


class Invalidate(Message, frozen=True):
    """Pushed by the metadata server: drop these from every cache, then answer."""

    entries: tuple[Invalidation, ...]


class InvalidateReply(Message, frozen=True):
    still_open: tuple[int, ...]


class ReleaseInodes(Message, frozen=True):
    """These unlinked nodes are no longer open at this client."""

    inodes: tuple[int, ...]


# --- name space ---------------------------------------------------------------------------------


class Lookup(Message, frozen=True):
    parent: int
    name: bytes


class GetAttributes(Message, frozen=True):
    ino: int


class SetAttributes(Message, frozen=True):
    """``None`` leaves a field as it is; ctime becomes now."""

    ino: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class CreateNode(Message, frozen=True):
    """``None`` inherits from the parent directory.

    With ``exclusive`` an existing name is an error; otherwise an existing file is returned.
    """

    parent: int
    name: bytes
    kind: NodeKind
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    exclusive: bool = True
    storage_class: StorageClass | None = None
    location: str | None = None
    durability: Durability | None = None
    allocation_blocks: int | None = None


class CreateReply(Message, frozen=True):
    attributes: Attributes
    created: bool


class RemoveNode(Message, frozen=True):
    parent: int
    name: bytes
    directory: bool
    """True: remove an empty directory (rmdir); False: anything else (unlink)."""
    not_open: int = 0
    """The inode that the client believes the name to be and knows not to have open: freed at once
    if so. Any other inode that loses its last name is held for this client until it releases it."""


class RemoveReply(Message, frozen=True):
    ino: int
    nlink: int
    held: bool
    """The node lives on, held for the asking client: it must send ``ReleaseInodes``."""
    parent: Attributes


class RenameFlag(enum.IntFlag):
    NONE = 0
    NO_REPLACE = 1
    EXCHANGE = 2


class RenameNode(Message, frozen=True):
    parent: int
    name: bytes
    new_parent: int
    new_name: bytes
    flags: RenameFlag = RenameFlag.NONE
    not_open: int = 0
    """As in ``RemoveNode``, of the node that is replaced."""


class RenameReply(Message, frozen=True):
    moved: Attributes
    replaced_ino: int
    replaced_held: bool
    parent: Attributes
    new_parent: Attributes


class LinkNode(Message, frozen=True):
    ino: int
    new_parent: int
    new_name: bytes


class ReadDirectory(Message, frozen=True):
    ino: int
    after_name: bytes
    """The last name already seen; empty for the first page. Names come in byte order."""
    entry_limit: int


class DirectoryEntry(Message, frozen=True):
    name: bytes
    attributes: Attributes


class DirectoryPage(Message, frozen=True):
    entries: tuple[DirectoryEntry, ...]
    complete: bool


class GetXattr(Message, frozen=True):
    ino: int
    name: bytes


class XattrValue(Message, frozen=True):
    value: bytes


class XattrFlag(enum.IntFlag):
    NONE = 0
    CREATE = 1
    REPLACE = 2


class SetXattr(Message, frozen=True):
    """Names under ``user.crail.`` read and set the node's placement."""

    ino: int
    name: bytes
    value: bytes
    flags: XattrFlag = XattrFlag.NONE


class RemoveXattr(Message, frozen=True):
    ino: int
    name: bytes


class ListXattr(Message, frozen=True):
    ino: int


class XattrNames(Message, frozen=True):
    names: tuple[bytes, ...]


# --- data ---------------------------------------------------------------------------------------


class GetExtents(Message, frozen=True):
    ino: int
    first_block: int
    block_count: int


class ExtentPage(Message, frozen=True):
    """Extents that touch the asked range, in order; what none covers is a hole."""

    extents: tuple[Extent, ...]
    next_block: int
    """Where to ask on, if the page was cut; otherwise the end of the asked range."""
    attributes: Attributes


class GrantBlocks(Message, frozen=True):
    storage_class: StorageClass
    location: str
    """Preferred host or rack; empty: ``host``."""
    host: str
    """The asking client's host."""
    block_count: int
    contiguous_blocks: int
    """Runs at least this long where there are any."""


class Grant(Message, frozen=True):
    """May be fewer blocks than asked, never none."""

    runs: tuple[Run, ...]


class ReturnBlocks(Message, frozen=True):
    runs: tuple[Run, ...]


class BaseBlock(Message, frozen=True):
    """What a partly written block was built on: place and generation together tell two versions
    of a file's block apart, also when both were written under one grant."""

    file_block: int
    generation: int
    """Of the block whose bytes were kept; 0: a hole."""
    region: int = 0
    block: int = 0
    """Where its first replica lies; 0 and 0 for a hole."""


class CommitFile(Message, frozen=True):
    """Publish blocks that are written and flushed. All or nothing.

    Fails with ``ConflictError`` if a block named in ``bases`` is no longer the one that was built
    upon: somebody else committed in between, and their bytes must be merged first.
    """

    ino: int
    extents: tuple[Extent, ...]
    bases: tuple[BaseBlock, ...]
    minimum_size: int
    """The file is at least this long afterwards."""
    mtime_ns: int
    unused: tuple[Run, ...] = ()
    """Granted blocks given back in the same step."""
    durable: bool = False
    """Answer only when the commit outlives a power cut (fsync)."""


class PutKeyValue(Message, frozen=True):
    """Create or replace a KEYVALUE of a TABLE in one step."""

    table: int
    key: bytes
    mode: int
    uid: int
    gid: int
    size: int
    extents: tuple[Extent, ...]
    unused: tuple[Run, ...] = ()


class SyncMetadata(Message, frozen=True):
    """Answered when everything acknowledged before outlives a power cut."""


# --- the table ----------------------------------------------------------------------------------


class Operation(NamedTuple):
    request: type[Message]
    reply: type[Message]
    mutates: bool = False
    request_payload: bool = False
    reply_payload: bool = False


class Opcode(enum.IntEnum):
    HELLO = 1
    PROOF = 2
    KEEP_ALIVE = 10
    INVALIDATE = 11
    RELEASE_INODES = 12
    END_SESSION = 13
    LOOKUP = 20
    GET_ATTRIBUTES = 21
    SET_ATTRIBUTES = 22
    CREATE_NODE = 23
    REMOVE_NODE = 24
    RENAME_NODE = 25
    LINK_NODE = 26
    READ_DIRECTORY = 27
    GET_XATTR = 28
    SET_XATTR = 29
    REMOVE_XATTR = 30
    LIST_XATTR = 31
    GET_STATISTICS = 32
    GET_EXTENTS = 40
    GRANT_BLOCKS = 41
    RETURN_BLOCKS = 42
    COMMIT_FILE = 43
    PUT_KEY_VALUE = 44
    SYNC_METADATA = 45
    REGISTER_STORAGE = 60
    STORAGE_HEARTBEAT = 61
    GET_CLUSTER_MAP = 62
    GET_STATUS = 63
    AUDIT = 64
    FETCH_HEADER_CHANGES = 65
    BEGIN_SALVAGE = 66
    SALVAGE_FILE = 67
    END_SALVAGE = 68
    NEXT_MOVES = 69
    MOVE_EXTENT = 70
    ATTACH_REGIONS = 80
    READ_BLOCKS = 81
    WRITE_BLOCKS = 82
    FLUSH_REGION = 83
    STORAGE_STATUS = 84
    REPORT_FAILED = 85
    READ_HEADERS = 86
    CONNECT_QUEUE_PAIR = 87


OPERATIONS: dict[Opcode, Operation] = {
    Opcode.HELLO: Operation(Hello, Challenge),
    Opcode.PROOF: Operation(Proof, Welcome),
    Opcode.KEEP_ALIVE: Operation(KeepAlive, KeepAliveReply),
    Opcode.INVALIDATE: Operation(Invalidate, InvalidateReply),
    Opcode.RELEASE_INODES: Operation(ReleaseInodes, Empty, mutates=True),
    Opcode.END_SESSION: Operation(EndSession, Empty),
    Opcode.LOOKUP: Operation(Lookup, Attributes),
    Opcode.GET_ATTRIBUTES: Operation(GetAttributes, Attributes),
    Opcode.SET_ATTRIBUTES: Operation(SetAttributes, Attributes, mutates=True),
    Opcode.CREATE_NODE: Operation(CreateNode, CreateReply, mutates=True),
    Opcode.REMOVE_NODE: Operation(RemoveNode, RemoveReply, mutates=True),
    Opcode.RENAME_NODE: Operation(RenameNode, RenameReply, mutates=True),
    Opcode.LINK_NODE: Operation(LinkNode, Attributes, mutates=True),
    Opcode.READ_DIRECTORY: Operation(ReadDirectory, DirectoryPage),
    Opcode.GET_XATTR: Operation(GetXattr, XattrValue),
    Opcode.SET_XATTR: Operation(SetXattr, Empty, mutates=True),
    Opcode.REMOVE_XATTR: Operation(RemoveXattr, Empty, mutates=True),
    Opcode.LIST_XATTR: Operation(ListXattr, XattrNames),
    Opcode.GET_STATISTICS: Operation(GetStatistics, Statistics),
    Opcode.GET_EXTENTS: Operation(GetExtents, ExtentPage),
    Opcode.GRANT_BLOCKS: Operation(GrantBlocks, Grant, mutates=True),
    Opcode.RETURN_BLOCKS: Operation(ReturnBlocks, Empty, mutates=True),
    Opcode.COMMIT_FILE: Operation(CommitFile, Attributes, mutates=True),
    Opcode.PUT_KEY_VALUE: Operation(PutKeyValue, Attributes, mutates=True),
    Opcode.SYNC_METADATA: Operation(SyncMetadata, Empty),
    Opcode.REGISTER_STORAGE: Operation(RegisterStorage, RegisterReply, mutates=True),
    Opcode.STORAGE_HEARTBEAT: Operation(StorageHeartbeat, HeartbeatReply, mutates=True),
    Opcode.GET_CLUSTER_MAP: Operation(GetClusterMap, ClusterMap),
    Opcode.GET_STATUS: Operation(GetStatus, Status),
    Opcode.AUDIT: Operation(Audit, AuditReply),
    Opcode.ATTACH_REGIONS: Operation(AttachRegions, AttachReply),
    Opcode.READ_BLOCKS: Operation(ReadBlocks, Empty, reply_payload=True),
    Opcode.WRITE_BLOCKS: Operation(WriteBlocks, Empty, mutates=True, request_payload=True),
    Opcode.FLUSH_REGION: Operation(FlushRegion, FlushReply),
    Opcode.STORAGE_STATUS: Operation(StorageStatus, StorageStatusReply),
    Opcode.REPORT_FAILED: Operation(ReportFailed, Empty),
    Opcode.READ_HEADERS: Operation(ReadHeaders, HeaderPage),
    Opcode.CONNECT_QUEUE_PAIR: Operation(ConnectQueuePair, QueuePairReply),
    Opcode.FETCH_HEADER_CHANGES: Operation(FetchHeaderChanges, HeaderChanges, mutates=True),
    Opcode.BEGIN_SALVAGE: Operation(BeginSalvage, Empty, mutates=True),
    Opcode.SALVAGE_FILE: Operation(SalvageFile, Empty, mutates=True),
    Opcode.END_SALVAGE: Operation(EndSalvage, Empty, mutates=True),
    Opcode.NEXT_MOVES: Operation(NextMoves, Moves),
    Opcode.MOVE_EXTENT: Operation(MoveExtent, Empty, mutates=True),
}
assert set(OPERATIONS) == set(Opcode), "every opcode has its row"
