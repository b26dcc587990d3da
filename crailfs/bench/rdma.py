"""``crail bench rdma``: what a MiB over RDMA takes of the processors at both ends, in counts.

Counts are the same on emulated devices and on real ones, unlike times. The client's are those of
its transport; a storage server's are the requests that it answered and how often its process was
woken (voluntary context switches). Servers wake by themselves too, for heartbeats and the like, so
what they did in as much idle time is shown beside it.
"""

from __future__ import annotations

import collections
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import msgspec
import trio

from crailfs.bench.progress import Progress
from crailfs.bench.report import aligned
from crailfs.cli.operator import address_of, connected
from crailfs.client.grants import merge_runs
from crailfs.client.store import CrailStore
from crailfs.client.stream import StoreFile
from crailfs.config import ClientConfig
from crailfs.errors import CrailError, UnavailableError
from crailfs.net.client import RpcClient
from crailfs.rdma.buffers import BufferPool
from crailfs.records import Extent, Run, StorageClass
from crailfs.transports.rdma import RdmaTransport
from crailfs.units import KIB, MIB
from crailfs.wire.messages import Opcode, StorageStatus, StorageStatusReply

FILE_BYTES: Final = 32 * MIB
WRITE_BYTES: Final = {"64 KiB": 64 * KIB, "1 MiB": MIB, "8 MiB": 8 * MIB}
"""How much is written, or read, by one call."""
_IDLE_SECONDS: Final = 5.0
_SERVED: Final = ("reads", "writes", "flushes")


class Count(msgspec.Struct, frozen=True):
    """One file written or read."""

    operation: str
    byte_count: int
    calls: int
    runs: int
    """Stretches of neighbouring blocks that were granted together, counted for each call."""
    verbs: dict[str, int]
    """WRITEs, FLUSHes and READs posted."""
    doorbells: int
    completions: int
    wakeups: int
    """Of the client, by completions."""
    copied_bytes: int
    """By the client's processor, from or to the program's memory."""
    tcp_operations: int
    """What did not go over RDMA after all, and requests to flush."""
    server_requests: int
    """About blocks, that the storage servers answered."""
    server_wakeups: int
    server_idle_wakeups: float
    """In as much time with nothing to do."""
    seconds: float


class Counts(msgspec.Struct, frozen=True):
    storage_class: str
    media: tuple[str, ...]
    """Of the regions that were written to."""
    rung: str
    """How writes were made durable, where they were."""
    counts: tuple[Count, ...]

    def table(self) -> str:
        header = ["operation", "calls", "runs", "WRITE", "FLUSH", "READ", "doorbells"]
        header += ["completions", "copied", "server requests", "wake-ups", "idle"]
        lines = [header]
        for count in self.counts:
            mib = count.byte_count / MIB
            numbers = [count.calls, count.runs, *count.verbs.values()]
            numbers += [count.doorbells, count.completions]
            by_mib = [count.copied_bytes / MIB, count.server_requests]
            by_mib += [count.server_wakeups, count.server_idle_wakeups]
            cells = [count.operation, *map(str, numbers)]
            lines.append([*cells, *(f"{number / mib:.2f}" for number in by_mib)])
        return (
            f"{aligned(lines)}\n"
            f"Files of {FILE_BYTES // MIB} MiB of class {self.storage_class} on "
            f"{', '.join(self.media)}; flush by {self.rung}. Totals as far as completions, then "
            "for each MiB: MiB copied by the client's processor, requests and wake-ups of the "
            "storage servers, and their wake-ups in as much idle time."
        )

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document


def measure(config: ClientConfig, storage_class: StorageClass) -> Counts:
    """Against a running file system, in a directory of its own, which is removed.

    Raises:
        UnavailableError: no storage server can be reached over RDMA from here.
    """
    only = msgspec.structs.replace(config, transports=("rdma",))
    with Progress("counting") as progress:
        return trio.run(_measure, only, storage_class, progress)


async def _measure(config: ClientConfig, storage_class: StorageClass, progress: Progress) -> Counts:
    place = f"/crail-bench-{os.getpid()}"
    content = random.Random(1).randbytes(FILE_BYTES)
    counts = []
    async with CrailStore.connect(config) as store:
        await store.mkdir(place, storage_class=storage_class)
        try:
            # Connects, and has the pool's buffers registered.
            path = f"{place}/warm-up"
            async with await store.create(path) as file:
                await _write(file, content, max(WRITE_BYTES.values()))
            async with await store.open(path) as file:
                await _read(file, content, max(WRITE_BYTES.values()))
            async with _servers(store, config) as servers:
                progress.show(None, "watching idle servers")
                await servers.learn_idle(_IDLE_SECONDS)
                extents: list[Extent] = []
                for name, call_bytes in WRITE_BYTES.items():
                    path = f"{place}/file-{call_bytes}"
                    for verb, action in (("write", _write), ("read", _read)):
                        progress.show(None, f"{verb} {name}")
                        count = await _count(
                            store, servers, f"{verb} {name}", path, action, content, call_bytes
                        )
                        counts.append(count)
                    extents += await store.filesystem.extents((await store.lookup(path)).ino)
            rungs = {transport.rung.name for transport in _transports(store)}
            media = await _media(store, extents)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(30):
                await store.delete(place, recursive=True)
    return Counts(str(storage_class), media, ", ".join(sorted(rungs)), tuple(counts))


async def _count(
    store: CrailStore,
    servers: _Servers,
    operation: str,
    path: str,
    action: Callable[[StoreFile, bytes, int], Awaitable[int]],
    content: bytes,
    call_bytes: int,
) -> Count:
    file = await (store.create(path) if action is _write else store.open(path))
    async with file:
        before, served_before = _total(store), await servers.counters()
        began = trio.current_time()
        copied_bytes = await action(file, content, call_bytes)
        seconds = trio.current_time() - began
        served = await servers.counters() - served_before
        done = _total(store) - before
    extents = await store.filesystem.extents((await store.lookup(path)).ino)
    return Count(
        operation=operation,
        byte_count=len(content),
        calls=len(content) // call_bytes,
        runs=_runs(extents, call_bytes, store.filesystem.block_size_bytes),
        verbs={verb: done[verb] for verb in ("writes", "flushes", "reads")},
        doorbells=done["doorbells"],
        completions=done["completions"],
        wakeups=done["wakeups"],
        copied_bytes=done["copied_bytes"] + copied_bytes,
        tcp_operations=done["tcp_operations"] + done["flush_requests"],
        server_requests=sum(served[name] for name in _SERVED),
        server_wakeups=served["wakeups"],
        server_idle_wakeups=servers.idle_wakeups(seconds),
        seconds=seconds,
    )


async def _write(file: StoreFile, content: bytes, call_bytes: int) -> int:
    """What was copied is the transport's to tell."""
    view = memoryview(content)
    for offset in range(0, len(view), call_bytes):
        await file.write(view[offset : offset + call_bytes])
    await file.sync()
    return 0


async def _read(file: StoreFile, content: bytes, call_bytes: int) -> int:
    """How much came in other memory than the device had put it into."""
    copied_bytes = 0
    for offset in range(0, len(content), call_bytes):
        data = await file.file.read(offset, call_bytes)
        if data != content[offset : offset + call_bytes]:
            raise CrailError(f"read other bytes at {offset} than were written")
        if not BufferPool.holds(data):
            copied_bytes += len(data)
    return copied_bytes


def _runs(extents: Iterable[Extent], call_bytes: int, block_size_bytes: int) -> int:
    """How many stretches of neighbouring blocks the calls touch, each call by itself."""
    call_blocks = max(1, call_bytes // block_size_bytes)
    by_call: dict[int, list[Run]] = collections.defaultdict(list)
    for extent in extents:
        place = extent.replicas[0]
        for index in range(extent.block_count):
            call = (extent.file_block + index) // call_blocks
            run = Run(place.region, place.block + index, 1, place.generation)
            by_call[call].append(run)
    return sum(len(merge_runs(runs)) for runs in by_call.values())


# --- who counts ---------------------------------------------------------------------------------


def _transports(store: CrailStore) -> list[RdmaTransport]:
    found = store.filesystem.storage.transports
    return [transport for transport in found if isinstance(transport, RdmaTransport)]


def _total(store: CrailStore) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for transport in _transports(store):
        total += transport.counters
    return total


class _Servers:
    """The storage servers' counters, added up."""

    def __init__(self, clients: list[RpcClient], timeout_ms: int) -> None:
        self._clients = clients
        self._timeout_ms = timeout_ms
        self._question_wakeups = 0.0
        self._idle_wakeups_per_second = 0.0

    async def counters(self) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for client in self._clients:
            reply = await client.call(
                Opcode.STORAGE_STATUS, StorageStatus(), deadline_ms=self._timeout_ms
            )
            assert isinstance(reply, StorageStatusReply)
            total += collections.Counter(reply.counters)
        return total

    async def learn_idle(self, seconds: float) -> None:
        """Of servers that answer one question at the beginning and one at the end."""
        first = await self.counters()
        second = await self.counters()
        self._question_wakeups = second["wakeups"] - first["wakeups"]
        await trio.sleep(seconds)
        slept = (await self.counters())["wakeups"] - second["wakeups"] - self._question_wakeups
        self._idle_wakeups_per_second = max(0.0, slept) / seconds

    def idle_wakeups(self, seconds: float) -> float:
        """Between two calls of ``counters`` that are so far apart."""
        return self._question_wakeups + self._idle_wakeups_per_second * seconds


@asynccontextmanager
async def _servers(store: CrailStore, config: ClientConfig) -> AsyncIterator[_Servers]:
    if not _transports(store):
        raise UnavailableError("nothing went over RDMA: `crail status` shows who offers it")
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connected(address_of(server), config))
            for server in (await store.filesystem.cluster_map()).servers
            if server.alive
        ]
        yield _Servers(clients, config.operation_timeout_ms)


async def _media(store: CrailStore, extents: Iterable[Extent]) -> tuple[str, ...]:
    used = {extent.replicas[0].region for extent in extents}
    regions = (await store.filesystem.cluster_map()).regions
    return tuple(
        sorted({f"{r.info.tier.name.lower()} ({r.info.medium})" for r in regions if r.id in used})
    )
