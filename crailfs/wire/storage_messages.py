"""Messages to and from storage servers, and those about the cluster as a whole."""

from __future__ import annotations

import enum

from crailfs.records import (
    Attributes,
    BlockHeader,
    Extent,
    HeaderChange,
    PlacedRegion,
    Record,
    RegionInfo,
    StorageServerInfo,
    Tier,
)

Message = Record


# --- space ------------------------------------------------------------------------------------


class TierStatistics(Message, frozen=True):
    tier: Tier
    total_blocks: int
    free_blocks: int
    """Counting what awaits reclaim: it comes back by itself."""


class GetStatistics(Message, frozen=True):
    pass


class Statistics(Message, frozen=True):
    block_size_bytes: int
    node_count: int
    tiers: tuple[TierStatistics, ...]


# --- membership and operation -------------------------------------------------------------------


class RegisterStorage(Message, frozen=True):
    server: StorageServerInfo
    regions: tuple[RegionInfo, ...]


class RegisterReply(Message, frozen=True):
    region_ids: tuple[int, ...]
    """In the order asked."""
    fence: tuple[int, ...]
    """Clients that must be cut off; answer in the next heartbeat's ``fenced``."""


class RegionState(Message, frozen=True):
    region_id: int
    usable_blocks: int
    """Blocks from the region's start that may be handed out already (memory is provisioned in
    the background)."""
    failed_blocks: tuple[int, ...]
    """Never to be handed out again."""


class StorageHeartbeat(Message, frozen=True):
    server_id: bytes
    regions: tuple[RegionState, ...]
    fenced: tuple[int, ...]
    """Clients that can no longer reach any block of this server by an old grant."""


class HeartbeatReply(Message, frozen=True):
    known: bool
    """False: register again."""
    fence: tuple[int, ...]
    high_water_blocks: tuple[int, ...]
    """Per region: one past the highest block handed out; provisioning stays ahead of it."""


class GetClusterMap(Message, frozen=True):
    pass


class ClusterMap(Message, frozen=True):
    cluster_id: bytes
    block_size_bytes: int
    servers: tuple[StorageServerInfo, ...]
    regions: tuple[PlacedRegion, ...]


class GetStatus(Message, frozen=True):
    pass


class RegionUse(Message, frozen=True):
    region_id: int
    free_blocks: int
    """Counting what is not yet provisioned."""
    returning_blocks: int
    """They come free by themselves, and are not counted as free."""
    failed_blocks: int
    lost: bool
    """Its server came back without it."""


class Status(Message, frozen=True):
    """For ``crail status``: the map, use and the metadata server's own counters."""

    cluster: ClusterMap
    statistics: Statistics
    session_count: int
    epoch: int
    uptime_seconds: float
    counters: dict[str, int]
    regions: tuple[RegionUse, ...] = ()
    """In the order of their ids."""


class Audit(Message, frozen=True):
    pass


class AuditReply(Message, frozen=True):
    findings: tuple[str, ...]
    """Broken invariants, for people; empty: none."""
    counts: dict[str, int]


# --- storage ------------------------------------------------------------------------------------


class AttachRegions(Message, frozen=True):
    """Unix sockets only: the reply comes with one file descriptor a region, in order, and last
    one descriptor of the client's life line (see docs/design.md, fencing)."""

    client_id: int


class Access(enum.IntEnum):
    """How a client of the same host reaches a region through its descriptor."""

    FILE = 0
    """pread and pwrite, through the page cache."""
    MAP = 1
    """mmap, shared."""
    DIRECT = 2
    """Direct I/O: offsets, lengths and addresses are multiples of 4096."""


class FlushMethod(enum.IntEnum):
    """How such a client makes what it wrote as durable as the medium can."""

    NONE = 0
    """Nothing helps: memory."""
    CACHE_LINES = 1
    """Cache-line write-back and fence, before a write counts as done (persistent memory)."""
    FILE = 2
    """fdatasync, when a flush is asked for."""
    MAPPING = 3
    """msync of the pages written, when a flush is asked for."""


class AttachedRegion(Message, frozen=True):
    region_id: int
    tier: Tier
    block_size_bytes: int
    block_count: int
    data_offset: int
    """Where block 0 begins in the file, in bytes: before it lies the superblock."""
    access: Access
    flush_method: FlushMethod = FlushMethod.NONE
    durable: bool = False
    """Whether bytes outlive a power cut once they are flushed."""
    segment_bytes: int = 0
    """0: all blocks follow each other in the file. Else they lie in segments of this many bytes,
    in order, which begin at ``segment_offsets``."""
    segment_offsets: tuple[int, ...] = ()
    """The first is ``data_offset``."""
    map_sync: bool = False
    """Map it with MAP_SYNC: a file on a DAX file system."""


class AttachReply(Message, frozen=True):
    regions: tuple[AttachedRegion, ...]


class ReadBlocks(Message, frozen=True):
    """The reply's payload is ``byte_count`` bytes from ``offset`` on, in bytes from the region's
    first block."""

    region: int
    offset: int
    byte_count: int


class WriteBlocks(Message, frozen=True):
    """The request's payload goes to ``offset``; refused if the block has a newer generation. In a
    region of tier nvme ``offset`` must be a multiple of 4096, and what follows the payload up to
    the next multiple becomes zeros."""

    region: int
    offset: int
    generation: int


class FlushRegion(Message, frozen=True):
    """Answered when all that this connection wrote to the region is as durable as it can be; or,
    with a ``byte_count``, these bytes, wherever they came from."""

    region: int
    offset: int = 0
    byte_count: int = 0
    """0: the whole region."""


class FlushReply(Message, frozen=True):
    durable: bool


class StorageStatus(Message, frozen=True):
    pass


class FlushRung(enum.IntEnum):
    """How writes to remote persistent memory become durable, strongest first."""

    RDMA_FLUSH = 1
    """RDMA FLUSH with persistent placement after the RDMA WRITE."""
    READ_AND_REQUEST = 2
    """RDMA READ after the RDMA WRITE, then ``FlushRegion``, which the server's processor does."""
    TCP = 3
    """``WriteBlocks``, answered when the bytes are flushed."""


class ClientConnection(Message, frozen=True):
    client_id: int
    peer: str
    """Its address, for people."""
    transport: str
    """``local``, ``rdma`` or ``tcp``."""
    rung: FlushRung = FlushRung.TCP
    """The strongest that this client can use at this server's persistent memory."""


class StorageStatusReply(Message, frozen=True):
    counters: dict[str, int]
    clients: tuple[ClientConnection, ...] = ()


class ReportFailed(Message, frozen=True):
    """A same-host client could not read or write these bytes: the server looks for itself."""

    region: int
    offset: int
    byte_count: int
    writing: bool = False
    """Its blocks are retired even if all of them can be read."""


# --- block headers ------------------------------------------------------------------------------


class FetchHeaderChanges(Message, frozen=True):
    """Asked by a storage server for its regions that keep headers. What is freed by an acknowledged
    change can be granted again."""

    server_id: bytes
    applied_sequence: int
    """Every change up to this one is durable in the regions."""
    change_limit: int


class HeaderChanges(Message, frozen=True):
    """In the order of what happened."""

    changes: tuple[HeaderChange, ...]
    last_sequence: int
    """Of ``changes``; if there are none, the one asked with."""
    complete: bool
    """Whether there was nothing more."""


class ReadHeaders(Message, frozen=True):
    """Headers in use from ``first_block`` on, up to one that does not check; ``DamagedError`` if
    that is its own."""

    region: int
    first_block: int
    header_limit: int


class HeaderPage(Message, frozen=True):
    headers: tuple[BlockHeader, ...]
    next_block: int
    """Where to ask on; the region's block count at its end."""


class BeginSalvage(Message, frozen=True):
    """A new, empty metadata server takes over regions whose name space is lost. Refused unless
    nothing was ever stored or granted."""

    next_ino: int
    next_generation: int
    """Above all that the regions' headers mention."""


class SalvageFile(Message, frozen=True):
    """A file of the lost name space, by the blocks that were found; goes to ``/lost+found``."""

    ino: int
    size: int
    extents: tuple[Extent, ...]


class EndSalvage(Message, frozen=True):
    """What no ``SalvageFile`` named becomes free, and the regions' blocks can be granted."""

    regions: tuple[int, ...]


# --- moving between tiers -----------------------------------------------------------------------


class NextMoves(Message, frozen=True):
    """A storage server asks what to move out of its regions."""

    server_id: bytes
    move_limit: int


class Move(Message, frozen=True):
    attributes: Attributes
    extent: Extent
    """Where it lies now, as a whole."""
    tier: Tier
    """Where it should go."""


class Moves(Message, frozen=True):
    moves: tuple[Move, ...]
    urgent: bool = False
    """A tier is nearly full: do not wait until the server is idle."""
    more: bool = False
    """Not everything was looked at, also if ``moves`` is empty: ask again at once."""


class MoveExtent(Message, frozen=True):
    """Copies are in ``new`` and flushed: put them in place of ``old``. Neither times nor
    ``data_version`` change. ``ConflictError`` if ``old`` is no longer there as it was."""

    ino: int
    old: Extent
    new: tuple[Extent, ...]


# --- queue pairs --------------------------------------------------------------------------------


class QueuePairEnd(Message, frozen=True):
    """What one end of a reliable connection has to know of the other."""

    gid: bytes
    """16 bytes."""
    number: int
    """24 bits."""
    packet_sequence: int
    """24 bits."""
    mtu: int
    """The largest path MTU that its port can, as ``ibv_mtu``: 1 is 256 bytes, 5 is 4096."""
    can_flush: bool
    """Whether its device and its verbs have RDMA FLUSH."""
    reads_max: int
    """RDMA READs that it can have outstanding as the target."""


class RemoteRegion(Message, frozen=True):
    """A region registered with the server's device."""

    region_id: int
    address: int
    """Of block 0, in the server's address space."""
    key: int
    """The rkey."""
    byte_count: int
    can_flush: bool
    """Whether RDMA FLUSH with persistent placement is allowed on it."""
    flush_on_request: bool
    """Whether ``FlushRegion`` makes what an RDMA READ saw durable."""


class ConnectQueuePair(Message, frozen=True):
    """The queue pair lives as long as this connection; it takes the place of an earlier one, which
    is destroyed before the answer."""

    end: QueuePairEnd


class QueuePairReply(Message, frozen=True):
    end: QueuePairEnd
    regions: tuple[RemoteRegion, ...]
