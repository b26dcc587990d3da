"""The pool of granted blocks against a metadata server that is one function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from crailfs.client.grants import REFILL_BLOCKS_MIN, GrantPool, Grants, merge_runs
from crailfs.errors import NoSpaceError
from crailfs.limits import GRANT_BLOCKS_MAX
from crailfs.records import ANY_TIER, Run

KEY = (ANY_TIER, "")


class Space:
    """So many blocks of one region, in one stretch."""

    def __init__(self, block_count: int = 1 << 20) -> None:
        self.next_block = 0
        self.block_count = block_count
        self.asked: list[int] = []
        self.returned: list[Run] = []

    async def request(self, block_count: int, contiguous_blocks: int) -> tuple[Run, ...]:
        await trio.lowlevel.checkpoint()
        self.asked.append(block_count)
        block_count = min(block_count, self.block_count - self.next_block)
        if block_count == 0:
            raise NoSpaceError("full")
        run = Run(1, self.next_block, block_count, len(self.asked))
        self.next_block += block_count
        return (run,)

    async def give_back(self, runs: list[Run]) -> None:
        self.returned += runs


def pool_of(space: Space, nursery: trio.Nursery) -> GrantPool:
    return GrantPool(space.request, nursery.start_soon)


async def test_one_request_serves_many_small_files() -> None:
    space = Space()
    async with trio.open_nursery() as nursery:
        pool = pool_of(space, nursery)
        runs = [await pool.take(1) for _ in range(8)]
    assert space.asked == [REFILL_BLOCKS_MIN]
    assert len({(run.block, run.generation) for run in runs}) == 8


async def test_streams_ask_for_more_and_more() -> None:
    space = Space()
    async with trio.open_nursery() as nursery:
        pool = pool_of(space, nursery)
        taken = 0
        while taken < 20_000:
            taken += (await pool.take(16)).block_count
            await trio.testing.wait_all_tasks_blocked()
    assert max(space.asked) == GRANT_BLOCKS_MAX
    assert len(space.asked) < 20


async def test_the_next_blocks_are_there_before_they_are_needed() -> None:
    space = Space()
    async with trio.open_nursery() as nursery:
        pool = pool_of(space, nursery)
        for _ in range(REFILL_BLOCKS_MIN - 1):
            await pool.take(1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(space.asked) == 2
        assert pool.block_count > REFILL_BLOCKS_MIN


async def test_what_nobody_takes_goes_back() -> None:
    space = Space()
    async with trio.open_nursery() as nursery:
        pool = pool_of(space, nursery)
        await pool.take(1)
        pool.tick()
        returned = pool.tick()
    assert sum(run.block_count for run in returned) == REFILL_BLOCKS_MIN - 1
    assert pool.block_count == 0


async def test_returned_blocks_are_taken_again_first() -> None:
    space = Space()
    async with trio.open_nursery() as nursery:
        pool = pool_of(space, nursery)
        run = await pool.take(4)
        pool.give_back(run)
        assert await pool.take(4) == run


async def test_blocks_that_arrive_after_the_session_ended_are_not_ours() -> None:
    space = Space()
    arrived = trio.Event()

    async def request(block_count: int, contiguous_blocks: int) -> tuple[Run, ...]:
        if not space.asked:
            space.asked.append(block_count)
            await arrived.wait()
            return (Run(1, 999, 1, 1),)
        return await space.request(block_count, contiguous_blocks)

    async with trio.open_nursery() as nursery:
        pool = GrantPool(request, nursery.start_soon)
        taken: list[Run] = []

        async def take() -> None:
            taken.append(await pool.take(1))

        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        pool.lose()
        arrived.set()
    assert taken[0].block != 999


async def test_full_gives_back_what_other_pools_hold_and_asks_again() -> None:
    space = Space(20)

    async def request(key: object, block_count: int, contiguous: int) -> tuple[Run, ...]:
        return await space.request(block_count, contiguous)

    async def give_back(runs: list[Run]) -> None:
        await space.give_back(runs)
        space.next_block -= sum(run.block_count for run in runs)

    def start_soon(task: Callable[[], Awaitable[None]]) -> None:
        pass

    grants = Grants(request, give_back, start_soon, lambda: None)
    await grants.take(KEY, 1)
    other = (ANY_TIER, "elsewhere")
    taken = 0
    while taken < 19:
        taken += (await grants.take(other, 1)).block_count
    assert space.returned, "the first pool's unused blocks went back"
    with pytest.raises(NoSpaceError):
        await grants.take(other, 1)
    with pytest.raises(NoSpaceError):
        await grants.take(KEY, 1)


def test_merging_runs() -> None:
    runs = [Run(1, 4, 2, 9), Run(1, 0, 4, 9), Run(1, 6, 1, 8), Run(2, 7, 1, 8)]
    assert merge_runs(runs) == [Run(1, 0, 6, 9), Run(1, 6, 1, 8), Run(2, 7, 1, 8)]
