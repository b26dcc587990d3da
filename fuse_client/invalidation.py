"""Makes this host's kernel forget what another client has changed.

The metadata server acknowledges a change only when those who cached the old state have answered,
and the kernel's caches are part of this client's: so the kernel has forgotten before the answer.

A worker thread does it, because the kernel blocks the caller: on page locks while pages are read,
and on a directory's lock for as long as a process here changes that directory. The second could
close a circle: two hosts create in the same directory, each kernel holds its own lock until its
own create is answered, and each create waits for the other host's answer. So an entry's
invalidation is waited for only as long as no change of that directory is under way from here;
otherwise it is carried out as soon as the kernel lets go of the directory, which is when that
change ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import pyfuse3
import trio

from crailfs.wire.messages import Invalidation

log = logging.getLogger(__name__)

THREADS_MAX = 8


class DirectoryChanges:
    """Which directories this host's kernel holds locked for a change that we have not answered."""

    def __init__(self) -> None:
        self._under_way: Counter[int] = Counter()
        self._waiting: dict[int, set[trio.Event]] = {}

    @contextlib.contextmanager
    def changing(self, *directories: int) -> Iterator[None]:
        for ino in directories:
            self._under_way[ino] += 1
            for event in self._waiting.pop(ino, ()):
                event.set()
        try:
            yield
        finally:
            for ino in directories:
                self._under_way[ino] -= 1
                if not self._under_way[ino]:
                    del self._under_way[ino]

    @contextlib.contextmanager
    def set_when_changing(self, ino: int, event: trio.Event) -> Iterator[None]:
        """Inside, ``event`` is set as soon as a change of directory ``ino`` is under way."""
        if ino in self._under_way:
            event.set()
        self._waiting.setdefault(ino, set()).add(event)
        try:
            yield
        finally:
            waiting = self._waiting.get(ino)
            if waiting is not None:
                waiting.discard(event)
                if not waiting:
                    del self._waiting[ino]


class KernelInvalidator:
    """Carries out ``Invalidation`` records on the kernel; ``nursery`` outlives the callers."""

    def __init__(self, nursery: trio.Nursery, changes: DirectoryChanges) -> None:
        self._nursery = nursery
        self._changes = changes
        self._threads = trio.CapacityLimiter(THREADS_MAX)

    async def invalidate(self, invalidations: tuple[Invalidation, ...]) -> None:
        """Returns when the kernel has forgotten (but see the module about locked directories)."""
        nodes = {entry.ino for entry in invalidations if not entry.name}
        names: dict[int, set[bytes]] = {}
        for entry in invalidations:
            if entry.name:
                names.setdefault(entry.ino, set()).add(entry.name)
        async with trio.open_nursery() as nursery:
            if nodes:
                nursery.start_soon(self._invalidate_nodes, nodes)
            for parent, changed in names.items():
                nursery.start_soon(self._invalidate_entries, parent, changed)

    async def _invalidate_nodes(self, nodes: set[int]) -> None:
        def forget() -> None:
            for ino in nodes:
                with _unknown_is_fine():
                    pyfuse3.invalidate_inode(ino)

        await trio.to_thread.run_sync(forget, limiter=self._threads)

    async def _invalidate_entries(self, parent: int, names: set[bytes]) -> None:
        finished = trio.Event()

        def forget() -> None:
            for name in names:
                with _unknown_is_fine():
                    pyfuse3.invalidate_entry(parent, name)

        async def run() -> None:
            try:
                await trio.to_thread.run_sync(forget, limiter=self._threads)
            finally:
                finished.set()

        self._nursery.start_soon(run)
        with self._changes.set_when_changing(parent, finished):
            await finished.wait()


@contextlib.contextmanager
def _unknown_is_fine() -> Iterator[None]:
    """The kernel need not know the node or name. Any other refusal is logged: what the kernel
    keeps then ends with its lease."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the kernel refused an invalidation: %s", error)
