"""Blocks that the metadata server granted to this client and that no file uses yet.

One pool for each storage class and location: a small file takes its block from there without a
request of its own. What is asked for grows while writers use it up quickly, and what nobody took
for a while goes back.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio
from msgspec.structs import replace

from crailfs.errors import CrailError, NoSpaceError
from crailfs.limits import GRANT_BLOCKS_MAX, GRANT_RUNS_MAX
from crailfs.records import Run, StorageClass

log = logging.getLogger(__name__)

PoolKey = tuple[StorageClass, str]
REFILL_BLOCKS_MIN: Final = 16
CONTIGUOUS_BLOCKS_MAX: Final = 128
_QUICK_SECONDS: Final = 1.0
"""A pool that was used up faster than this asks for twice as much."""


def split(run: Run, block_count: int) -> tuple[Run, Run]:
    """The first ``block_count`` blocks of ``run``, and the rest."""
    first = Run(run.region, run.block, block_count, run.generation)
    rest = Run(run.region, run.block + block_count, run.block_count - block_count, run.generation)
    return first, rest


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """The same blocks in as few runs as there can be."""
    merged: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.region, run.block)):
        last = merged[-1] if merged else None
        if last is not None and _follows(last, run):
            merged[-1] = replace(last, block_count=last.block_count + run.block_count)
        else:
            merged.append(run)
    return merged


def _follows(run: Run, behind: Run) -> bool:
    """Whether ``behind`` begins where ``run`` ends, and was granted with it."""
    end = run.block + run.block_count
    return (run.region, run.generation, end) == (behind.region, behind.generation, behind.block)


class GrantPool:
    """Granted blocks of one storage class and location.

    ``request`` asks the metadata server for so many blocks, in runs at least as long as the second
    number where there are any; ``start_soon`` starts a task that lives as long as the client.
    """

    def __init__(
        self,
        request: Callable[[int, int], Awaitable[tuple[Run, ...]]],
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._request = request
        self._start_soon = start_soon
        self._runs: deque[Run] = deque()
        self._refill_blocks = REFILL_BLOCKS_MIN
        self._refilled_at = float("-inf")
        self._lock = trio.Lock()
        self._prefetching = False
        self._taken_since_tick = 0
        self._lost = 0
        self.block_count = 0

    async def take(self, block_count: int) -> Run:
        """One run of 1 to ``block_count`` blocks.

        Raises ``NoSpaceError`` when every tier of the storage class is full.
        """
        while not self._runs:
            await self._refill(block_count)
        return self._take_first(block_count)

    def take_behind(self, run: Run, block_count: int) -> Run | None:
        """``run`` with up to ``block_count`` more blocks, if those that follow it are here."""
        if not self._runs or not _follows(run, self._runs[0]):
            return None
        more = self._take_first(block_count)
        return replace(run, block_count=run.block_count + more.block_count)

    def _take_first(self, block_count: int) -> Run:
        run = self._runs[0]
        if run.block_count <= block_count:
            self._runs.popleft()
        else:
            run, self._runs[0] = split(run, block_count)
        self.block_count -= run.block_count
        self._taken_since_tick += run.block_count
        if self.block_count * 4 < self._refill_blocks and not self._prefetching:
            self._prefetching = True
            self._start_soon(self._prefetch)
        return run

    def give_back(self, run: Run) -> None:
        """A run of this pool that was not used, or that holds nothing that anybody needs."""
        self.block_count += run.block_count
        if self._runs and _follows(run, self._runs[0]):
            run = replace(run, block_count=run.block_count + self._runs.popleft().block_count)
        self._runs.appendleft(run)

    def tick(self) -> list[Run]:
        """To be called about once a second: what should go back to the metadata server now."""
        wanted = 2 * self._taken_since_tick
        if self._taken_since_tick == 0:
            self._refill_blocks = REFILL_BLOCKS_MIN
        else:
            wanted += REFILL_BLOCKS_MIN
        self._taken_since_tick = 0
        returned: list[Run] = []
        while self.block_count > wanted and len(returned) < GRANT_RUNS_MAX:
            run = self._runs.pop()
            excess = self.block_count - wanted
            if run.block_count > excess:
                kept, run = split(run, run.block_count - excess)
                self._runs.append(kept)
            self.block_count -= run.block_count
            returned.append(run)
        return merge_runs(returned)

    def drain(self) -> list[Run]:
        """Everything: the file system is closing, or another pool needs the space."""
        runs = merge_runs(self._runs)
        self._runs.clear()
        self.block_count = 0
        return runs

    def lose(self) -> None:
        """The session ended: nothing here, or on its way here, is ours any more."""
        self._runs.clear()
        self.block_count = 0
        self._lost += 1

    async def _refill(self, block_count: int) -> None:
        async with self._lock:
            if self._runs:
                return
            await self._fetch(block_count)

    async def _fetch(self, block_count: int) -> None:
        now = trio.current_time()
        if now - self._refilled_at < _QUICK_SECONDS:
            self._refill_blocks = min(self._refill_blocks * 2, GRANT_BLOCKS_MAX)
        self._refilled_at = now
        asked = min(max(self._refill_blocks, block_count), GRANT_BLOCKS_MAX)
        lost = self._lost
        runs = await self._request(asked, min(asked, CONTIGUOUS_BLOCKS_MAX))
        if lost != self._lost:
            return
        self._runs.extend(runs)
        self.block_count += sum(run.block_count for run in runs)

    async def _prefetch(self) -> None:
        try:
            async with self._lock:
                if self.block_count * 4 < self._refill_blocks:
                    await self._fetch(REFILL_BLOCKS_MIN)
        except NoSpaceError:
            log.debug("no space to prefetch; the writer that needs it will be told")
        except CrailError as error:
            log.warning("prefetching blocks failed (the writer will ask again): %s", error)
        finally:
            self._prefetching = False


class Grants:
    """All pools of this client, and the way back to the metadata server."""

    def __init__(
        self,
        request: Callable[[PoolKey, int, int], Awaitable[tuple[Run, ...]]],
        return_runs: Callable[[list[Run]], Awaitable[None]],
        start_soon: Callable[[Callable[[], Awaitable[None]]], None],
        release_reserved: Callable[[], None],
    ) -> None:
        """``release_reserved`` makes files give back what they took and do not use yet."""
        self._request = request
        self._return_runs = return_runs
        self._start_soon = start_soon
        self._release_reserved = release_reserved
        self._pools: dict[PoolKey, GrantPool] = {}

    def pool(self, key: PoolKey) -> GrantPool:
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = GrantPool(
                functools.partial(self._request, key), self._start_soon
            )
        return pool

    async def take(self, key: PoolKey, block_count: int) -> Run:
        """One run of 1 to ``block_count`` blocks.

        Raises ``NoSpaceError`` when every tier of the class is full, even after this client has
        given back all that it held elsewhere.
        """
        pool = self.pool(key)
        try:
            return await pool.take(block_count)
        except NoSpaceError:
            self._release_reserved()
            if pool.block_count == 0:
                unused = [run for other in self._pools.values() for run in other.drain()]
                if not unused:
                    raise
                await self._give_to_server(unused)
            return await pool.take(block_count)

    def take_behind(self, key: PoolKey, run: Run, block_count: int) -> Run | None:
        """``run`` with up to ``block_count`` more blocks, if those that follow it are here."""
        return self.pool(key).take_behind(run, block_count)

    def give_back(self, key: PoolKey, run: Run) -> None:
        self.pool(key).give_back(run)

    async def tick(self) -> None:
        """About once a second: return what nobody took for a while."""
        for pool in list(self._pools.values()):
            await self._give_to_server(pool.tick())

    async def drain(self) -> None:
        """Return everything: the client is closing."""
        for pool in list(self._pools.values()):
            await self._give_to_server(pool.drain())

    def lose(self) -> None:
        for pool in self._pools.values():
            pool.lose()

    async def _give_to_server(self, runs: list[Run]) -> None:
        for first in range(0, len(runs), GRANT_RUNS_MAX):
            try:
                await self._return_runs(runs[first : first + GRANT_RUNS_MAX])
            except CrailError as error:
                # They come free with the session at the latest.
                log.warning("returning %d runs of unused blocks: %s", len(runs) - first, error)
