"""Writes: into granted blocks that no reader can see, published by a commit.

Whoever calls a method with a ``FileState`` holds it (``FileState.exclusive``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Final, TypeAlias

import trio

from crailfs.client.block_map import place_of
from crailfs.client.commit import Batch, first_batch
from crailfs.client.file_state import FileState, PendingBlock
from crailfs.client.grants import CONTIGUOUS_BLOCKS_MAX, Grants, split
from crailfs.client.pending_io import PendingIo
from crailfs.client.ranges import RangeSet
from crailfs.client.reader import Reader
from crailfs.client.session import Session
from crailfs.client.storage import StorageAccess
from crailfs.errors import (
    ConflictError,
    CrailError,
    FencedError,
    NoSpaceError,
    NotFoundError,
    StaleError,
    TooLargeError,
    UnavailableError,
)
from crailfs.limits import FILE_SIZE_MAX_BYTES
from crailfs.records import Attributes, Extent, Location, Run
from crailfs.units import blocks_for
from crailfs.wire.messages import CommitFile, Opcode, SyncMetadata

log = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

_PENDING_BLOCKS_MAX: Final = 8_192
"""A file with more of them commits in the middle of writing."""
_MERGE_ATTEMPTS_MAX: Final = 32


class Writer:
    def __init__(
        self,
        session: Session,
        storage: StorageAccess,
        grants: Grants,
        reader: Reader,
        pending_io: PendingIo,
        block_size_bytes: int,
    ) -> None:
        self._session = session
        self._storage = storage
        self._grants = grants
        self._reader = reader
        self._io = pending_io
        self._block_size_bytes = block_size_bytes

    # --- writing ----------------------------------------------------------------------------

    async def write(self, state: FileState, offset: int, data: Buffer) -> None:
        """Raises ``NoSpaceError`` when every tier is full: what came before that stays written."""
        view = memoryview(data).cast("B")
        if offset + len(view) > FILE_SIZE_MAX_BYTES:
            raise TooLargeError(
                f"writing up to byte {offset + len(view)}: a file has at most {FILE_SIZE_MAX_BYTES}"
            )
        if state.uncertain or len(state.pending) >= _PENDING_BLOCKS_MAX:
            await self.commit(state)
        block_size = self._block_size_bytes
        position = 0
        while position < len(view):
            file_block, inner_offset = divmod(offset + position, block_size)
            left = len(view) - position
            if inner_offset == 0 and left >= block_size:
                count = await self._write_whole(state, file_block, view[position:])
            else:
                count = min(block_size - inner_offset, left)
                part = view[position : position + count]
                await self._write_part(state, file_block, inner_offset, part)
            position += count
            state.pending_end = max(state.pending_end, offset + position)
            state.mtime_ns = time.time_ns()
            state.writes += 1

    async def write_value(self, state: FileState, data: Buffer) -> tuple[Extent, ...]:
        """Write ``data`` for a state that is no file's yet; its extents are for one commit.

        Raises ``NoSpaceError``, and ``TooLargeError`` if one commit cannot carry them.
        """
        try:
            await self._write_fresh(state, data)
            await self._io.finish(state)
            batch = first_batch(state.pending, self._block_size_bytes)
            if len(batch.file_blocks) < len(state.pending):
                raise TooLargeError(
                    f"a value of {len(data)} bytes is too large for one commit: write a file"
                )
        except (NoSpaceError, TooLargeError):
            await self._io.settle(state)
            self.discard(state)
            raise
        finally:
            self.release_reserved(state)
        return batch.extents

    async def _write_fresh(self, state: FileState, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        block_size = self._block_size_bytes
        position = 0
        while len(view) - position >= block_size:
            position += await self._write_whole(state, position // block_size, view[position:])
        if position < len(view):
            run = await self._allocate(state, 1)
            block = await self._io.begin(state, run, view[position:])
            state.pending[position // block_size] = block

    async def _write_whole(self, state: FileState, file_block: int, data: memoryview) -> int:
        """Write as many whole blocks as there is a run for; returns their bytes."""
        block_size = self._block_size_bytes
        pending = state.pending
        block = pending.get(file_block)
        if block is not None:
            await self._io.replace(state, block, data[:block_size])
            block.dirty = None
            return block_size
        count = 1
        limit = len(data) // block_size
        while count < limit and file_block + count not in pending:
            count += 1
        run = await self._allocate(state, count)
        byte_count = run.block_count * block_size
        for block in await self._io.put_whole(state, run, data[:byte_count]):
            pending[file_block] = block
            file_block += 1
        return byte_count

    async def _write_part(
        self, state: FileState, file_block: int, inner_offset: int, data: memoryview
    ) -> None:
        block = state.pending.get(file_block)
        end = inner_offset + len(data)
        if block is None:
            await self._copy_on_write(state, file_block, inner_offset, data)
            return
        await self._io.change(state, block, inner_offset, data)
        if block.dirty is not None:
            block.dirty.add(inner_offset, end)
            if block.dirty.covers(0, self._block_size_bytes):
                block.dirty = None

    async def _copy_on_write(
        self, state: FileState, file_block: int, inner_offset: int, data: memoryview
    ) -> None:
        extent = await self._reader.committed(state, file_block)
        end = inner_offset + len(data)
        base: Buffer = b""
        if extent is not None and (
            inner_offset > 0 or end < self._reader.visible_bytes(extent, file_block)
        ):
            base = await self._reader.read_block(extent, file_block)
        content: Buffer = data
        if inner_offset or len(base):
            content = bytearray(max(len(base), end))
            content[: len(base)] = base
            content[inner_offset:end] = data
        run = await self._allocate(state, 1)
        block = await self._io.begin(state, run, content)
        block.base = place_of(extent, file_block)
        block.dirty = RangeSet((inner_offset, end))
        state.pending[file_block] = block

    async def _allocate(self, state: FileState, block_count: int) -> Run:
        """A run of 1 to ``block_count`` blocks. A file that grows takes more at once, so that its
        blocks come to lie next to each other."""
        ahead = min(max(state.taken_blocks, state.allocation_blocks), CONTIGUOUS_BLOCKS_MAX)
        run, state.reserved = state.reserved, None
        if run is None:
            run = await self._grants.take(state.pool_key, max(block_count, ahead))
            state.taken_blocks += run.block_count
            if self._storage.known(run.region) is None:
                try:
                    await self._storage.transport(run.region)
                except CrailError:
                    self._grants.give_back(state.pool_key, run)
                    raise
        while run.block_count < block_count:
            wanted = max(block_count - run.block_count, ahead)
            longer = self._grants.take_behind(state.pool_key, run, wanted)
            if longer is None:
                break
            state.taken_blocks += longer.block_count - run.block_count
            run = longer
        if run.block_count > block_count:
            run, state.reserved = split(run, block_count)
        return run

    # --- cutting ----------------------------------------------------------------------------

    async def shorten(self, state: FileState, size: int) -> None:
        """Forget what was written beyond ``size``; the committed part is the caller's."""
        await self._io.settle(state)
        block_size = self._block_size_bytes
        end_block = blocks_for(size, block_size)
        for file_block in [known for known in state.pending if known >= end_block]:
            self._drop(state, file_block)
        last_block, visible_bytes = divmod(size, block_size)
        block = state.pending.get(last_block)
        if block is not None and visible_bytes:
            self._io.shorten(block, visible_bytes)
            if block.dirty is not None:
                block.dirty.remove(visible_bytes, block_size)
                if not len(block.dirty):
                    self._drop(state, last_block)
        state.pending_end = min(state.pending_end, size)
        state.writes += 1

    def _drop(self, state: FileState, file_block: int) -> None:
        """Its block holds nothing that anybody needs, and nothing is on its way there."""
        block = state.pending.pop(file_block)
        state.collected.pop(block, None)
        state.epoch += 1
        if file_block in state.uncertain:
            state.uncertain.remove(file_block)
        else:
            self._grants.give_back(state.pool_key, block.run)

    def release_reserved(self, state: FileState) -> None:
        if state.reserved is not None:
            self._grants.give_back(state.pool_key, state.reserved)
            state.reserved = None

    # --- committing -------------------------------------------------------------------------

    async def sync(self, state: FileState) -> None:
        """Commit, and make bytes and commit as durable as the file's tiers can."""
        if state.uncertain:
            await self._resolve_uncertain(state)
        await self._finish(state)
        await self._note_committed(state)
        await self._flush(state)
        state.raise_failure()  # the session may have ended meanwhile, and with it what was pending
        if state.pending:
            await self.commit(state, durable=True)
        elif state.node.attributes is not None and state.node.attributes.synced:
            await self._session.call(Opcode.SYNC_METADATA, SyncMetadata())
        else:
            await self._commit_nothing(state)

    async def _note_committed(self, state: FileState) -> None:
        """Committed bytes that nobody may have flushed yet are to be flushed as well: another
        client may have written them, or this one before it closed the file and opened it again."""
        blocks = await self._reader.blocks(state, 0, 0)
        attributes = state.node.attributes
        assert attributes is not None
        version = attributes.data_version
        if version == state.flushed_version:
            return
        end_block = blocks_for(attributes.size, self._block_size_bytes)
        if blocks.knows(0, end_block):
            state.unflushed_regions |= _regions_of(blocks.overlapping(0, end_block))
        else:
            # What is committed while the pages come is in them, or belongs to a later version.
            async for page in self._reader.pages(state.ino):
                state.unflushed_regions |= _regions_of(page.extents)
        state.flushed_version = version

    async def _flush(self, state: FileState) -> None:
        regions, state.unflushed_regions = state.unflushed_regions, set()
        try:
            await self._io.flush(regions)
        except BaseException:
            state.unflushed_regions |= regions
            raise

    async def commit(self, state: FileState, *, durable: bool = False) -> None:
        """Publish everything that is pending.

        Raises late errors of writes, and then what was pending is lost. After
        ``UnavailableError`` it is still here: commit again.
        """
        if state.uncertain:
            await self._resolve_uncertain(state)
        merges = 0
        while state.pending:
            await self._finish(state)
            if durable and merges:
                await self._flush(state)
            if not state.pending:
                break
            batch = first_batch(state.pending, self._block_size_bytes)
            try:
                await self._commit_batch(state, batch, durable)
            except ConflictError as error:
                merges += 1
                if merges > _MERGE_ATTEMPTS_MAX:
                    raise
                log.debug("inode %d: merging with another client: %s", state.ino, error)
                await self._merge(state)
            except (NotFoundError, StaleError):
                self.discard(state)
                raise
            except CrailError as error:
                if not isinstance(error, UnavailableError):
                    state.forget_pending()
                if isinstance(error, FencedError):
                    state.failure = None
                raise
        state.pending_end = 0
        state.raise_failure()

    def discard(self, state: FileState) -> None:
        """Give up what is pending: the file is gone."""
        for file_block in list(state.pending):
            self._drop(state, file_block)
        state.forget_pending()

    async def _finish(self, state: FileState) -> None:
        try:
            await self._io.finish(state)
        except CrailError:
            # Bytes may still arrive in these blocks: they come free with the session.
            state.forget_pending()
            state.raise_failure()  # the session ended meanwhile: that is why
            raise

    async def _commit_batch(self, state: FileState, batch: Batch, durable: bool) -> None:
        cache = self._session.cache
        is_last = len(batch.file_blocks) == len(state.pending)
        last = batch.extents[-1]
        end_block = last.file_block + last.block_count - 1
        batch_end = end_block * self._block_size_bytes + last.tail_visible_bytes
        request = CommitFile(
            ino=state.ino,
            extents=batch.extents,
            bases=batch.bases,
            minimum_size=state.pending_end if is_last else min(state.pending_end, batch_end),
            mtime_ns=state.mtime_ns,
            durable=durable and is_last,
        )
        ticket = cache.ticket()
        try:
            attributes: Attributes = await self._session.call(Opcode.COMMIT_FILE, request)
        except (UnavailableError, trio.Cancelled):
            state.uncertain |= set(batch.file_blocks)
            raise
        for file_block in batch.file_blocks:
            state.pending.pop(file_block, None)
        state.uncertain -= set(batch.file_blocks)
        state.epoch += 1
        if attributes.data_version == state.flushed_version + 1:
            state.flushed_version += 1  # nobody else has changed it
        blocks = cache.blocks_before(state.node, attributes, data_changes=1)
        node = cache.store(attributes, ticket, changed=True)
        if node is not None and blocks is not None:
            for extent in batch.extents:
                blocks.put(extent)
            cache.set_blocks(node, blocks)

    async def _commit_nothing(self, state: FileState) -> None:
        """What is committed shall outlive a power cut, and not be moved to where it does not."""
        request = CommitFile(state.ino, (), (), 0, state.mtime_ns, durable=True)
        cache = self._session.cache
        ticket = cache.ticket()
        attributes: Attributes = await self._session.call(Opcode.COMMIT_FILE, request)
        cache.store(attributes, ticket, changed=True)

    async def _resolve_uncertain(self, state: FileState) -> None:
        """Find out what became of a commit that was never answered. What is not found committed is
        to be committed again as it is: the metadata server knows whose the blocks are."""
        first, end = min(state.uncertain), max(state.uncertain) + 1
        committed = await self._reader.fresh_extents(state, first, end)
        self._session.cache.invalidate(state.ino)
        for file_block in list(state.uncertain):
            block = state.pending[file_block]
            own = Location(block.region, block.block, block.generation)
            if place_of(committed.at(file_block), file_block) == own:
                del state.pending[file_block]
                state.uncertain.remove(file_block)
                state.epoch += 1
        if not state.pending:
            state.pending_end = 0

    async def _merge(self, state: FileState) -> None:
        """Lay this client's bytes over the blocks that another client committed meanwhile."""
        partly = {
            file_block: block
            for file_block, block in state.pending.items()
            if block.dirty is not None
        }
        self._session.cache.drop_blocks(state.ino)
        fresh = await self._reader.fresh_extents(state, min(partly), max(partly) + 1)
        for file_block, block in partly.items():
            extent = fresh.at(file_block)
            place = place_of(extent, file_block)
            if place != block.base:
                base = b"" if extent is None else await self._reader.read_block(extent, file_block)
                merged = await self._rebased(state, block, base)
                self._drop(state, file_block)
                merged.base = place
                state.pending[file_block] = merged

    async def _rebased(self, state: FileState, block: PendingBlock, base: Buffer) -> PendingBlock:
        """A fresh block with this client's bytes of ``block`` over ``base``."""
        assert block.dirty is not None
        own = memoryview(await self._io.read(state, block))
        dirty_end = max(end for _, end in block.dirty)
        content = bytearray(max(len(base), dirty_end))
        content[: len(base)] = base
        for start, end in block.dirty:
            content[start:end] = own[start:end]
        merged = await self._io.begin(state, await self._allocate(state, 1), content)
        merged.dirty = block.dirty
        return merged


def _regions_of(extents: Iterable[Extent]) -> set[int]:
    return {place.region for extent in extents for place in extent.replicas}
