"""``crail bench pmem``: the persistent memory tier beside the memory tier, on this host.

On tmpfs, where there is no persistent memory, it does all that it would do there: non-temporal
stores, cache-line write-back, fences, block headers in transactions. What it costs shows.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import trio

from crailfs.bench import streams
from crailfs.bench.progress import Progress
from crailfs.bench.report import Report, Row
from crailfs.bench.servers import start_servers
from crailfs.bench.workbench import Workbench
from crailfs.client.store import CrailStore
from crailfs.config import ClientConfig, RegionConfig
from crailfs.records import StorageClass, Tier
from crailfs.units import KIB, MIB

DIRECTORY: Final = Path("/dev/shm")
_TIERS: Final = {"memory": Tier.MEMORY, "pmem": Tier.PMEM}
_CHUNKS: Final = {"64 KiB": 64 * KIB, "1 MiB": MIB}
UNITS: Final = {
    **{f"{verb} {name}": "MB/s" for name in _CHUNKS for verb in ("write", "read")},
    "write and flush 64 KiB": "us",
}


class Sizes(NamedTuple):
    """How much one round does."""

    file_bytes: int = 128 * MIB
    flushes: int = 500

    def scaled(self, factor: float) -> Sizes:
        return Sizes(
            max(round(self.file_bytes * factor) // MIB, 1) * MIB,
            max(round(self.flushes * factor), 1),
        )

    @property
    def region_bytes(self) -> int:
        """What is removed comes free after the next file is begun."""
        return 6 * self.file_bytes + 64 * MIB


def measure(
    directory: Path = DIRECTORY, *, round_count: int = 9, sizes: Sizes | None = None
) -> Report:
    """Servers of its own with a region of each tier, the persistent one in ``directory``, and one
    client on the same host. Every workload runs on one tier and then on the other.

    Raises:
        CrailError: a server did not start, say for want of libpmemobj.
    """
    chosen = sizes or Sizes()
    report = Report("Persistent memory", list(_TIERS), UNITS, "in flight", "memory")
    with (
        Workbench("bench") as bench,
        tempfile.TemporaryDirectory(prefix="crail-bench-", dir=directory) as place,
        Progress("measuring persistent memory") as progress,
    ):
        memory = RegionConfig(
            tier=Tier.MEMORY, path=bench.shared_memory / "memory", size_bytes=chosen.region_bytes
        )
        pmem = RegionConfig(
            tier=Tier.PMEM, path=Path(place, "pmem"), size_bytes=chosen.region_bytes
        )
        progress.show(None, "starting servers")
        client = start_servers(bench, (memory, pmem)).client()
        trio.run(_measure, client, report, chosen, round_count, progress)
    return report


async def _measure(
    client: ClientConfig, report: Report, sizes: Sizes, round_count: int, progress: Progress
) -> None:
    local = msgspec.structs.replace(client, transports=("local",))
    async with CrailStore.connect(local) as store:
        for region in (await store.filesystem.cluster_map()).regions:
            label = region.info.medium or region.info.tier.name.lower()
            report.notes.append(f"{region.info.tier.name.lower()}: {label}.")
        for label, tier in _TIERS.items():
            progress.show(None, f"{label}: warming up")
            await store.mkdir(f"/{label}", storage_class=StorageClass.parse(label))
            await streams.warm_up(store, f"/{label}", tier)
        for number in range(round_count):
            # Whoever comes second finds the processor's caches full of the other's bytes.
            labels = list(_TIERS)[:: 1 if number % 2 == 0 else -1]
            for chunk in _CHUNKS:
                progress.show(number / round_count, f"{chunk}, round {number + 1}")
                await _stream(store, report, labels, chunk, sizes)
            for label in labels:
                await _flushes(store, report, label, sizes.flushes)


async def _stream(
    store: CrailStore, report: Report, labels: list[str], chunk: str, sizes: Sizes
) -> None:
    for verb, work in (("write", streams.write), ("read", streams.read)):
        for label in labels:
            rate = await work(store, f"/{label}/file", _CHUNKS[chunk], sizes.file_bytes)
            report.add(Row(f"{verb} {chunk}", "1"), label, rate)
    for label in labels:
        await store.delete(f"/{label}/file")
        await streams.wait_for_space(store, _TIERS[label], 2 * sizes.file_bytes)


async def _flushes(store: CrailStore, report: Report, label: str, count: int) -> None:
    """Each write is durable, and known to the metadata server, before the next begins."""
    content = bytes(64 * KIB)
    path = f"/{label}/flushed"
    async with await store.create(path, exclusive=True) as file:
        began = time.perf_counter()
        for _ in range(count):
            await file.write(content)
            await file.sync()
        seconds = time.perf_counter() - began
    report.add(Row("write and flush 64 KiB", "1"), label, seconds / count * 1e6)
    await store.delete(path)
