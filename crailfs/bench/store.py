"""``crail bench store``: the Python API against a running file system, by each transport."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import msgspec
import trio

from crailfs.bench import streams
from crailfs.bench.progress import Progress
from crailfs.bench.report import Report, Row
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig
from crailfs.errors import CrailError
from crailfs.units import KIB, MIB

T = TypeVar("T")

ROUND_TIMEOUT_SECONDS: Final = 180.0
IN_FLIGHT: Final = 32
CHUNKS: Final = {"4 KiB": 4 * KIB, "128 KiB": 128 * KIB, "1 MiB": MIB}
UNITS: Final = {
    "lookup": "us",
    "lookup, many": "/s",
    "lookup again": "us",
    "create+close": "us",
    "delete": "us",
    **{f"write {name}": "MB/s" for name in CHUNKS},
    **{f"read {name}": "MB/s" for name in CHUNKS},
    "random read 4 KiB": "us",
}


class Sizes(NamedTuple):
    """How much one round does."""

    lookups: int = 2_000
    many_lookups: int = 8_000
    creates: int = 1_000
    stream_bytes: int = 256 * MIB
    small_stream_bytes: int = 32 * MIB
    """With the smallest chunk."""
    random_reads: int = 4_000

    def scaled(self, factor: float) -> Sizes:
        def count(usual: int) -> int:
            return max(round(usual * factor), 1)

        def whole_mib(usual_bytes: int) -> int:
            return max(round(usual_bytes * factor) // MIB, 1) * MIB

        return Sizes(
            lookups=count(self.lookups),
            many_lookups=count(self.many_lookups),
            creates=count(self.creates),
            stream_bytes=whole_mib(self.stream_bytes),
            small_stream_bytes=whole_mib(self.small_stream_bytes),
            random_reads=count(self.random_reads),
        )


def measure(
    config: ClientConfig,
    transports: Sequence[str],
    *,
    round_count: int = 3,
    sizes: Sizes | None = None,
) -> Report:
    """Run every workload over every transport, one transport after the other in each round.

    A transport that fails or does not end in time is given up and named in the report.
    """
    report = Report("Store API", list(transports), UNITS, "in flight", transports[0])
    report.notes.append(
        "Reads and lookups are a new client's, which knows nothing of what another one wrote; "
        "'lookup again' asks for what its lease still covers."
    )
    with Progress("measuring the store") as progress:
        rounds = [name for _ in range(round_count) for name in transports]
        for number, name in enumerate(rounds):
            if name in report.failures:
                continue
            one = msgspec.structs.replace(config, transports=(name,))
            told = _Told(progress, number / len(rounds), 1 / len(rounds), name)
            try:
                trio.run(_round, one, sizes or Sizes(), report, told)
            except* (CrailError, trio.TooSlowError) as group:
                report.failures[name] = str(_first(group))
    return report


@dataclass
class _Told:
    """Where the round is."""

    progress: Progress
    begin: float
    share: float
    transport: str
    workload: str = ""
    done: int = 0

    def next(self, workload: str) -> None:
        self.workload = workload
        self.done += 1
        self.show()

    def show(self) -> None:
        fraction = self.begin + self.share * self.done / len(UNITS)
        self.progress.show(fraction, f"{self.transport}: {self.workload}")


async def _round(config: ClientConfig, sizes: Sizes, report: Report, told: _Told) -> None:
    limit = trio.move_on_after(ROUND_TIMEOUT_SECONDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show, told)
        with limit:
            async with _place(config) as place:
                run = _Round(config, place, sizes, report, told)
                await run.names()
                await run.data()
        nursery.cancel_scope.cancel()
    if limit.cancelled_caught:
        raise trio.TooSlowError(
            f"{told.workload}: the round was not done after {ROUND_TIMEOUT_SECONDS:.0f} s"
        )


async def _show(told: _Told) -> None:
    while True:
        told.show()
        await trio.sleep(0.2)


@asynccontextmanager
async def _place(config: ClientConfig) -> AsyncIterator[str]:
    """A directory of this round's own."""
    place = f"/crail-bench-{os.getpid()}-{config.transports[0]}"
    # By clients that end: one that stayed would have to be told of each change in the directory.
    async with CrailStore.connect(config) as store:
        await store.mkdir(place)
    try:
        yield place
    finally:
        # With a deadline of its own, should the round have been cancelled.
        with trio.CancelScope(shield=True), trio.move_on_after(ROUND_TIMEOUT_SECONDS / 4):
            async with CrailStore.connect(config) as store:
                await store.delete(place, recursive=True)


class _Round:
    """The workloads of one transport, once."""

    def __init__(
        self, config: ClientConfig, place: str, sizes: Sizes, report: Report, told: _Told
    ) -> None:
        self._config = config
        self._place = place
        self._sizes = sizes
        self._report = report
        self._told = told

    async def names(self) -> None:
        sizes = self._sizes
        files = [f"{self._place}/file-{number}" for number in range(sizes.creates)]
        more = [f"{self._place}/more-{n}" for n in range(sizes.lookups + sizes.many_lookups)]
        async with CrailStore.connect(self._config) as store:

            async def create(path: str) -> None:
                await (await store.create(path, exclusive=True)).close()

            await create(f"{self._place}/first")
            await self._each("create+close", create, files)
            await _many(create, more)
            await self._each("delete", store.delete, files)
        async with CrailStore.connect(self._config) as store:
            await store.lookup(f"{self._place}/first")
            await self._each("lookup", store.lookup, more[: sizes.lookups])
            await self._each("lookup again", store.lookup, more[: sizes.lookups])
            self._told.next("lookup, many")
            began = time.perf_counter()
            await _many(store.lookup, more[sizes.lookups :])
            seconds = time.perf_counter() - began
            self._add("lookup, many", sizes.many_lookups / seconds, in_flight=IN_FLIGHT)

    async def data(self) -> None:
        for name, chunk_bytes in CHUNKS.items():
            small = chunk_bytes == min(CHUNKS.values())
            total_bytes = self._sizes.small_stream_bytes if small else self._sizes.stream_bytes
            path = f"{self._place}/stream-{chunk_bytes}"
            async with CrailStore.connect(self._config) as store:
                self._told.next(f"write {name}")
                began = time.perf_counter()
                async with await store.create(path) as file:
                    await streams.write_to(file, chunk_bytes, total_bytes)
                self._add_rate(f"write {name}", total_bytes, time.perf_counter() - began)
            async with CrailStore.connect(self._config) as store, await store.open(path) as file:
                self._told.next(f"read {name}")
                began = time.perf_counter()
                await streams.read_from(file, chunk_bytes, total_bytes)
                self._add_rate(f"read {name}", total_bytes, time.perf_counter() - began)
        page_count = total_bytes // CHUNKS["4 KiB"]
        pages = random.Random(2).choices(range(page_count), k=self._sizes.random_reads)
        async with CrailStore.connect(self._config) as store, await store.open(path) as file:

            async def read_page(page: int) -> None:
                await file.read_at(page * CHUNKS["4 KiB"], CHUNKS["4 KiB"])

            await self._each("random read 4 KiB", read_page, pages)

    async def _each(
        self, workload: str, operation: Callable[[T], Awaitable[object]], subjects: Sequence[T]
    ) -> None:
        """One after the other."""
        self._told.next(workload)
        began = time.perf_counter()
        for subject in subjects:
            await operation(subject)
        self._add(workload, (time.perf_counter() - began) / len(subjects) * 1e6)

    def _add_rate(self, workload: str, amount_bytes: int, seconds: float) -> None:
        self._add(workload, amount_bytes / seconds / 1e6)

    def _add(self, workload: str, value: float, *, in_flight: int = 1) -> None:
        self._report.add(Row(workload, str(in_flight)), self._config.transports[0], value)


async def _many(operation: Callable[[str], Awaitable[object]], paths: Sequence[str]) -> None:
    """``IN_FLIGHT`` at a time."""
    waiting = iter(paths)

    async def work() -> None:
        for path in waiting:
            await operation(path)

    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(work)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
