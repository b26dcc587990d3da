"""Makes the regions' own block headers follow what the metadata server says that files own.

The metadata server is the authority and keeps every change until it hears that it is durable here.
So it does not matter when this process dies: what was fetched and not acknowledged is fetched and
made again, which changes nothing (see ``HeaderStore.apply``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from crailfs.errors import CrailError, ProtocolError
from crailfs.limits import HEADER_CHANGES_MAX, STORAGE_TIMEOUT_MS
from crailfs.net.client import RpcClient
from crailfs.records import HeaderChange
from crailfs.wire.messages import FetchHeaderChanges, HeaderChanges, Opcode
from storage_server.region import Region
from storage_server.services import Services

log = logging.getLogger(__name__)

BUSY_INTERVAL_S: Final = 0.025
"""Between two questions while there are changes."""
IDLE_INTERVAL_S: Final = 0.5
"""The longest between two questions: the interval doubles while there are no changes."""


class HeaderFollower:
    """Follows for all regions of one storage server that keep headers."""

    def __init__(
        self, metadata: RpcClient, server_id: bytes, regions: Sequence[Region], services: Services
    ) -> None:
        self._metadata = metadata
        self._server_id = server_id
        self._regions = [region for region in regions if region.headers is not None]
        self._counters = services.counters
        self._applied_sequence = min(
            (region.header_sequence for region in self._regions), default=0
        )
        """All regions have every change up to this one, or are not concerned by it."""

    async def run(self) -> None:
        """Until cancelled; returns at once if no region keeps headers."""
        interval_s, failure = BUSY_INTERVAL_S, ""
        while self._regions:
            try:
                page = await self.step()
            except CrailError as error:
                log.warning("block headers do not follow: %s; trying again", error.message)
                interval_s = IDLE_INTERVAL_S
            except OSError as error:
                self._counters["header_errors"] += 1
                if str(error) != failure:
                    log.error(
                        "block headers cannot be written: %s; trying again. Until then blocks "
                        "that files no longer have do not come free: check the device",
                        error,
                    )
                failure = str(error)
                interval_s = IDLE_INTERVAL_S
            else:
                failure = ""
                if not page.complete:
                    continue
                idle_s = min(2 * interval_s, IDLE_INTERVAL_S)
                interval_s = BUSY_INTERVAL_S if page.changes else idle_s
            await trio.sleep(interval_s)

    async def step(self) -> HeaderChanges:
        """Acknowledge what is durable, fetch what is next and make it durable.

        Raises what the metadata server answers, ``ProtocolError`` for changes that cannot be,
        ``OSError`` if a device fails.
        """
        page = await self._metadata.call(
            Opcode.FETCH_HEADER_CHANGES,
            FetchHeaderChanges(self._server_id, self._applied_sequence, HEADER_CHANGES_MAX),
            deadline_ms=STORAGE_TIMEOUT_MS,
        )
        if not isinstance(page, HeaderChanges):
            raise ProtocolError("the metadata server answered for headers with something else")
        if not page.changes:
            return page
        await self._apply(self._by_region(page.changes), page.last_sequence)
        self._counters["header_changes"] += len(page.changes)
        self._applied_sequence = page.last_sequence
        return page

    def _by_region(self, changes: Sequence[HeaderChange]) -> dict[Region, list[HeaderChange]]:
        regions = {region.region_id: region for region in self._regions}
        found: dict[Region, list[HeaderChange]] = {}
        for change in changes:
            region = regions.get(change.region)
            if region is None or not region.has_blocks(change.block, change.block_count):
                raise ProtocolError(
                    f"a header change for blocks {change.block}+{change.block_count} of region "
                    f"{change.region}, which are not here"
                )
            found.setdefault(region, []).append(change)
        return found

    async def _apply(self, changes: dict[Region, list[HeaderChange]], last_sequence: int) -> None:
        # After a crash between two regions one is ahead of the other, and must not go back.
        behind = {
            region: of_region
            for region, of_region in changes.items()
            if region.header_sequence < last_sequence
        }
        if len(changes) > 1:
            # A file's block may have gone from one region to another: it is here or there, or for
            # a moment in both, never in neither.
            for region, of_region in behind.items():
                published = _published(of_region, region.medium.superblock.block_size_bytes)
                await region.apply_headers(published, region.header_sequence)
        for region, of_region in behind.items():
            await region.apply_headers(of_region, last_sequence)
        for region, of_region in changes.items():
            for change in of_region:
                if not change.ino:
                    await self._discard(region, change)

    async def _discard(self, region: Region, change: HeaderChange) -> None:
        """A device that refuses advice still has the blocks: they come free all the same."""
        try:
            await region.medium.discard(change.block, change.block_count)
        except OSError as error:
            self._counters["discard_errors"] += 1
            log.warning(
                "region %s: blocks %d+%d are not discarded: %s",
                region.medium.path, change.block, change.block_count, error.strerror,
            )  # fmt: skip
        else:
            self._counters["blocks_discarded"] += change.block_count


def _published(changes: Sequence[HeaderChange], block_size_bytes: int) -> list[HeaderChange]:
    """Of the blocks that ``changes`` leave with a file; the others keep for now what they have. (A
    block that is cleared is not granted again before that is acknowledged.)"""
    cleared: set[int] = set()
    for change in changes:
        if not change.ino:
            cleared.update(range(change.block, change.block + change.block_count))
    kept: list[HeaderChange] = []
    for change in changes:
        if not change.ino:
            continue
        blocks = range(change.block, change.block + change.block_count)
        if cleared.isdisjoint(blocks):
            kept.append(change)
            continue
        kept += [
            _cut(change, index, block_size_bytes)
            for index, block in enumerate(blocks)
            if block not in cleared
        ]
    return kept


def _cut(change: HeaderChange, index: int, block_size_bytes: int) -> HeaderChange:
    """One block of it."""
    is_last = index == change.block_count - 1
    return HeaderChange(
        change.region,
        change.block + index,
        1,
        change.ino,
        change.file_block + index,
        change.generation,
        change.tail_stored_bytes if is_last else block_size_bytes,
        change.tail_visible_bytes if is_last else block_size_bytes,
        change.checksums[8 * index : 8 * index + 8],
    )
