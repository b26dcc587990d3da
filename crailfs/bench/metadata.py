"""``crail bench metadata``: what many files cost the servers of an embedded file system."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from crailfs.bench.progress import Progress
from crailfs.bench.report import aligned
from crailfs.client.store import CrailStore
from crailfs.embedded.state import State
from crailfs.errors import UnavailableError
from crailfs.units import MIB, format_bytes

FILES_PER_DIRECTORY: Final = 1_000
_IN_FLIGHT: Final = 64
_CHECKPOINT_TIMEOUT_SECONDS: Final = 60.0
_EMPTY_JOURNAL_BYTES: Final = 1 * MIB


class ProcessMemory(msgspec.Struct):
    """Resident memory of one process, in bytes, as the kernel divides it."""

    own_bytes: int
    """Anonymous: what the process needs for itself."""
    file_bytes: int
    """Mapped files: programs, and LMDB's pages, which the kernel takes back when it needs them."""
    shared_bytes: int
    """Shared memory: regions."""


class Figures(msgspec.Struct):
    file_count: int
    create_seconds: float
    lmdb_bytes: int
    """Allocated on disk."""
    processes: dict[str, ProcessMemory]

    def table(self) -> str:
        lines = [["process", "own", "mapped files", "shared memory"]]
        for name, memory in self.processes.items():
            sizes = (memory.own_bytes, memory.file_bytes, memory.shared_bytes)
            lines.append([name, *(format_bytes(size) for size in sizes)])
        return (
            f"{self.file_count:,} files made in {self.create_seconds:.0f} s "
            f"({self.file_count / self.create_seconds:,.0f} a second); "
            f"LMDB: {format_bytes(self.lmdb_bytes)}\n{aligned(lines)}"
        )

    def as_json(self) -> dict[str, Any]:
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document


def measure(state: State, file_count: int) -> Figures:
    """Make ``file_count`` empty files below a new directory, which is left there, and look at the
    servers then.

    Raises:
        UnavailableError: the file system does not run, or makes no checkpoint.
        ExistsError: the directory is there from an earlier run.
    """
    running = state.read_running()
    if running is None:
        raise UnavailableError(f"the file system of {state.directory} does not run: `crail up` it")
    with Progress(f"making {file_count:,} files") as progress:
        seconds = trio.run(_make, state, file_count, progress)
        _await_checkpoint(state.directory / "metadata" / "journal", progress)
    lmdb_file = state.directory / "metadata" / "lmdb" / "data.mdb"
    return Figures(
        file_count=file_count,
        create_seconds=seconds,
        lmdb_bytes=lmdb_file.stat().st_blocks * 512,
        processes={
            name: _memory_of(process.identity.pid)
            for name, process in running.processes.items()
            if process.identity is not None
        },
    )


def _await_checkpoint(journal: Path, progress: Progress) -> None:
    """Until LMDB has what was made: a checkpoint empties the journal."""
    deadline = time.monotonic() + _CHECKPOINT_TIMEOUT_SECONDS
    while journal.stat().st_size > _EMPTY_JOURNAL_BYTES:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{journal} was not emptied within {_CHECKPOINT_TIMEOUT_SECONDS:.0f} s: see the "
                "metadata server's log"
            )
        progress.show(None, "waiting for a checkpoint")
        time.sleep(0.1)


async def _make(state: State, file_count: int, progress: Progress) -> float:
    top = "/crail-bench-files"
    done = 0
    async with CrailStore.connect(state.settings().client()) as store:
        await store.mkdir(top)
        began = time.monotonic()
        for first in range(0, file_count, FILES_PER_DIRECTORY):
            directory = f"{top}/{first // FILES_PER_DIRECTORY:06d}"
            await store.mkdir(directory)
            waiting = iter(range(first, min(first + FILES_PER_DIRECTORY, file_count)))

            async def work(directory: str = directory, waiting: Any = waiting) -> None:
                for number in waiting:
                    path = f"{directory}/part-{number:08d}.data"
                    await (await store.create(path, exclusive=True)).close()

            async with trio.open_nursery() as nursery:
                for _ in range(_IN_FLIGHT):
                    nursery.start_soon(work)
            done = min(first + FILES_PER_DIRECTORY, file_count)
            progress.show(done / file_count)
        return time.monotonic() - began


def _memory_of(pid: int) -> ProcessMemory:
    lines = Path("/proc", str(pid), "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)

    def size_bytes(name: str) -> int:
        return int(fields[name].split()[0]) * 1024

    return ProcessMemory(size_bytes("RssAnon"), size_bytes("RssFile"), size_bytes("RssShmem"))
