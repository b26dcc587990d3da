"""``crail bench nvme``: the NVMe tier beside ``fio`` with the same pattern on the same disk.

Three subjects take turns: ``fio``; ``medium``, the storage server's own reads and writes of a
region; and ``client``, files of that tier through the client library, which adds checksums, block
maps and copy on write (of a whole block, for each random write of 4 KiB); what it does in a row is
one call after the other, at any depth. Nobody's bytes come from the page cache: all three use
direct I/O.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import trio

from crailfs.bench import fio, streams
from crailfs.bench.fio import PATTERNS, Pattern
from crailfs.bench.progress import Progress
from crailfs.bench.report import Report, Row
from crailfs.bench.servers import start_servers
from crailfs.bench.workbench import Workbench
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig, RegionConfig
from crailfs.device_io.buffers import AlignedBuffers
from crailfs.limits import BLOCK_SIZE_DEFAULT_BYTES
from crailfs.records import Tier
from crailfs.units import MIB
from storage_server.media import Medium, open_medium

DIRECTORY: Final = Path("/var/tmp")
UNITS: Final = {pattern.name: pattern.unit for pattern in PATTERNS}
_STREAM_DIRECTORY: Final = "/nvme"


class Sizes(NamedTuple):
    file_bytes: int = 512 * MIB
    """What each of the three works on."""
    seconds: float = 2.0
    """How long each does each pattern in a round; streams through the client library go once
    through the file instead."""

    def scaled(self, factor: float) -> Sizes:
        return Sizes(
            max(round(self.file_bytes * factor) // MIB, 4) * MIB, max(self.seconds * factor, 0.05)
        )


def measure(
    directory: Path = DIRECTORY, *, round_count: int = 3, sizes: Sizes | None = None
) -> Report:
    """All in new files in ``directory``, which must be on the disk that is meant.

    Raises:
        CrailError: a server did not start, or fio failed.
        ConfigurationError: the file system of ``directory`` has no direct I/O.
    """
    chosen = sizes or Sizes()
    report = Report("NVMe", ["fio", "medium", "client"], UNITS, "in flight", "fio")
    with (
        Workbench("bench") as bench,
        tempfile.TemporaryDirectory(prefix="crail-bench-", dir=directory) as place,
        Progress("measuring the NVMe tier") as progress,
    ):
        progress.show(None, "making regions")
        # Room for a file, for the one that is removed meanwhile, and for copies on write.
        own = RegionConfig(
            tier=Tier.NVME, path=Path(place, "region"), size_bytes=4 * chosen.file_bytes
        )
        client = start_servers(bench, (own,)).client()
        alone = RegionConfig(
            tier=Tier.NVME, path=Path(place, "medium"), size_bytes=chosen.file_bytes + 64 * MIB
        )
        medium = open_medium(
            alone,
            cluster_id=os.urandom(16),
            block_size_bytes=BLOCK_SIZE_DEFAULT_BYTES,
            known_uuid=None,
        )
        report.notes.append(f"The medium is: {medium.kind}.")
        try:
            trio.run(
                _measure, _Subjects(Path(place, "fio"), medium, client, chosen), report,
                round_count, progress,
            )  # fmt: skip
        finally:
            medium.close()
    return report


class _Subjects(NamedTuple):
    fio_file: Path
    medium: Medium
    client: ClientConfig
    sizes: Sizes


async def _measure(
    subjects: _Subjects, report: Report, round_count: int, progress: Progress
) -> None:
    sizes = subjects.sizes
    async with _client(subjects.client) as store:
        by_name: dict[str, Callable[[Pattern], Awaitable[float]]] = {
            "medium": functools.partial(_of_medium, subjects.medium, sizes),
            "client": _Client(store, sizes).run,
        }
        reason = fio.missing()
        if reason is None:
            by_name["fio"] = functools.partial(_of_fio, subjects.fio_file, sizes)
        else:
            report.notes.append(f"{reason}: nothing to compare with.")
        progress.show(None, "writing everything once")
        # A file system notes where a preallocated file is written for the first time.
        await _fill(subjects.medium, sizes)
        await streams.warm_up(store, _STREAM_DIRECTORY, Tier.NVME)
        if reason is None:
            await fio.fill(subjects.fio_file, sizes.file_bytes)
        for number in range(round_count):
            names = list(by_name)
            first = number % len(names)
            for position, pattern in enumerate(PATTERNS):
                done = (number + position / len(PATTERNS)) / round_count
                for name in names[first:] + names[:first]:
                    progress.show(done, f"{name}: {pattern.name}")
                    value = await by_name[name](pattern)
                    report.add(Row(pattern.name, str(pattern.depth)), name, value)


@asynccontextmanager
async def _client(config: ClientConfig) -> AsyncIterator[CrailStore]:
    local = msgspec.structs.replace(config, transports=("local",))
    async with CrailStore.connect(local) as store:
        await store.mkdir(_STREAM_DIRECTORY)
        yield store


# --- fio, and the medium by itself --------------------------------------------------------------


async def _of_fio(path: Path, sizes: Sizes, pattern: Pattern) -> float:
    return await fio.run(path, sizes.file_bytes, pattern, sizes.seconds)


async def _of_medium(medium: Medium, sizes: Sizes, pattern: Pattern) -> float:
    buffers = AlignedBuffers()
    content = random.Random(1).randbytes(pattern.block_bytes)
    offsets = _offsets(pattern, sizes.file_bytes)

    async def work(until: float) -> int:
        buffer = buffers.take(pattern.block_bytes)
        buffer[:] = content
        operation = medium.write if pattern.is_write else medium.read
        count = 0
        while time.perf_counter() < until:
            await operation(next(offsets), buffer)
            count += 1
        return count

    return await _at_depth(pattern, sizes.seconds, work)


async def _fill(medium: Medium, sizes: Sizes) -> None:
    buffer = AlignedBuffers().take(MIB)
    for offset in range(0, sizes.file_bytes, MIB):
        await medium.write(offset, buffer)


def _offsets(pattern: Pattern, size_bytes: int) -> Iterator[int]:
    """In a row, again and again, or at random without end."""
    block_count = size_bytes // pattern.block_bytes
    if not pattern.is_random:
        return itertools.cycle(range(0, block_count * pattern.block_bytes, pattern.block_bytes))
    # Made beforehand: making one takes a tenth of what an operation takes.
    chosen = random.Random(2).choices(range(block_count), k=50_000)
    return itertools.cycle([number * pattern.block_bytes for number in chosen])


async def _at_depth(
    pattern: Pattern, seconds: float, work: Callable[[float], Awaitable[int]]
) -> float:
    """``pattern.depth`` workers, each of which goes on until a time on the clock and returns how
    many blocks it did; all of them in the pattern's unit."""
    counts: list[int] = []
    began = time.perf_counter()

    async def one() -> None:
        counts.append(await work(began + seconds))

    async with trio.open_nursery() as nursery:
        for _ in range(pattern.depth):
            nursery.start_soon(one)
    per_second = sum(counts) / (time.perf_counter() - began)
    return per_second if pattern.unit == "IOPS" else per_second * pattern.block_bytes / 1e6


# --- through the client library -----------------------------------------------------------------


class _Client:
    """Streams make a new file each time; the other patterns work on the last one."""

    def __init__(self, store: CrailStore, sizes: Sizes) -> None:
        self._store = store
        self._sizes = sizes
        self._numbers = itertools.count()
        self._path = ""

    async def run(self, pattern: Pattern) -> float:
        if pattern.is_random:
            return await self._at_random(pattern)
        if not pattern.is_write:
            return await streams.read(
                self._store, self._path, pattern.block_bytes, self._sizes.file_bytes
            )
        if self._path:
            await self._store.delete(self._path)
            await streams.wait_for_space(self._store, Tier.NVME, 3 * self._sizes.file_bytes)
        self._path = f"{_STREAM_DIRECTORY}/stream-{next(self._numbers)}"
        return await streams.write(
            self._store, self._path, pattern.block_bytes, self._sizes.file_bytes
        )

    async def _at_random(self, pattern: Pattern) -> float:
        """What was written is flushed within the time that is counted."""
        content = bytes(pattern.block_bytes)
        offsets = _offsets(pattern, self._sizes.file_bytes)
        async with await self._store.open(self._path) as file:

            async def work(until: float) -> int:
                count = 0
                while time.perf_counter() < until:
                    if pattern.is_write:
                        await file.write_at(next(offsets), content)
                    else:
                        await file.read_at(next(offsets), pattern.block_bytes)
                    count += 1
                return count

            began = time.perf_counter()
            rate = await _at_depth(pattern, self._sizes.seconds, work)
            worked = time.perf_counter()
            if pattern.is_write:
                await file.sync()
            return rate * (worked - began) / (time.perf_counter() - began)
