"""What this client holds of one inode that is open here, shared by all of its handles."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio
import xxhash

from crailfs.client.block_map import HOLE
from crailfs.client.cache import Node
from crailfs.client.grants import PoolKey
from crailfs.client.ranges import RangeSet
from crailfs.errors import CrailError
from crailfs.records import ANY_TIER, Attributes, Durability, Run
from crailfs.units import blocks_for


class PendingBlock:
    """A granted block with bytes that no commit has published yet.

    ``dirty`` are the bytes that this client wrote; the others below ``stored_bytes`` were copied
    from the committed block at ``base`` (or are zeros of a hole). ``None``: all of the block was
    written, whatever it was before.
    """

    __slots__ = (
        "base",
        "block",
        "buffer",
        "checksum",
        "dirty",
        "generation",
        "hasher",
        "region",
        "stored_bytes",
    )

    def __init__(self, region: int, block: int, generation: int, stored_bytes: int) -> None:
        self.region = region
        self.block = block
        self.generation = generation
        self.stored_bytes = stored_bytes
        self.base = HOLE
        self.dirty: RangeSet | None = None
        self.checksum: int | None = None
        """Of the stored bytes, once known; any further write clears it."""
        self.hasher: xxhash.xxh3_64 | None = None
        """Of the stored bytes as long as they arrive in order."""
        self.buffer: bytearray | None = None
        """Where nothing is written in place: the stored bytes, not yet sent."""

    @property
    def run(self) -> Run:
        return Run(self.region, self.block, 1, self.generation)

    def known_checksum(self) -> int | None:
        if self.checksum is None and self.hasher is not None:
            return self.hasher.intdigest()
        return self.checksum

    def content_changed(self) -> None:
        self.checksum = None
        self.hasher = None


class FileState:
    """Changes go through ``exclusive``; readers look again after each await."""

    def __init__(self, node: Node, block_size_bytes: int) -> None:
        self.ino = node.ino
        self.node = node
        self.handles = 0
        self.known: Attributes | None = None
        """As last heard of, whether or not they are still under a lease."""
        self.durability = Durability.FSYNC
        self.held = False
        """The node has no name left and lives on for this client: to be released at the end."""
        self.pending: dict[int, PendingBlock] = {}
        self.pending_end = 0
        """The file is at least this long once the pending blocks are committed; 0: no matter."""
        self.mtime_ns = 0
        self.pool_key: PoolKey = (ANY_TIER, "")
        """Where its blocks come from and unused ones go back to."""
        self.collected: dict[PendingBlock, None] = {}
        """Pending blocks with a buffer, in the order in which they were begun."""
        self.uncertain: set[int] = set()
        """File blocks whose commit was sent and never answered: they may be committed, and even be
        somebody else's by now, so nothing is written there again."""
        self.reserved: Run | None = None
        self.taken_blocks = 0
        self.allocation_blocks = 1
        self.unflushed_regions: set[int] = set()
        """Where bytes lie that the next fsync has to flush."""
        self.flushed_version = -1
        """The ``data_version`` as of which all that is committed was flushed from here or lies in
        ``unflushed_regions``."""
        self.failure: CrailError | None = None
        """To be raised once by the next operation."""
        self.in_flight = 0
        self.settled = trio.lowlevel.ParkingLot()
        self.write_error: CrailError | None = None
        self.writes = 0
        """Counts this client's changes: what was read ahead before is of no use."""
        self.epoch = 0
        """Counts when pending blocks cease to be that: a reader of one must look again, because
        the block may have been used for something else."""
        self._lock = trio.Lock()
        self._block_size_bytes = block_size_bytes

    def place(self, attributes: Attributes) -> None:
        """Where its blocks are to come from: as ``attributes`` say, as long as it is open."""
        placement = attributes.placement
        self.pool_key = (placement.storage_class, placement.location)
        self.allocation_blocks = placement.allocation_blocks
        self.durability = placement.durability

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    async def acquire(self) -> None:
        """Without a turn through the scheduler where nobody else is at it."""
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def current_attributes(self) -> Attributes:
        """As last heard of, with what is pending."""
        if self.node.attributes is not None:
            self.known = self.node.attributes
        assert self.known is not None, "the file was opened"
        return self.overlay(self.known)

    def overlay(self, attributes: Attributes) -> Attributes:
        """``attributes`` as they will be after the next commit."""
        if not self.pending:
            return attributes
        size = max(attributes.size, self.pending_end)
        return msgspec.structs.replace(
            attributes,
            size=size,
            block_count=max(
                attributes.block_count,
                min(
                    blocks_for(size, self._block_size_bytes),
                    attributes.block_count + len(self.pending),
                ),
            ),
            mtime_ns=self.mtime_ns,
            ctime_ns=max(attributes.ctime_ns, self.mtime_ns),
        )

    def lose(self, error: CrailError) -> None:
        """The session ended: what was not committed is lost."""
        if self.pending or self.in_flight:
            self.failure = error
        self.forget_pending()
        self.reserved = None

    def forget_pending(self) -> None:
        self.pending.clear()
        self.collected.clear()
        self.uncertain.clear()
        self.pending_end = 0
        self.writes += 1
        self.epoch += 1
