"""Direct I/O in worker threads, for kernels that forbid io_uring. 100 us of processor a request."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from crailfs.device_io.file_io import read_exactly, write_all

THREADS_MAX: Final = 16


class Threads:
    """See ``Engine``. A killed process is gone, with its descriptors and locks, only when its
    threads have come back from the device, so a life line needs no further care."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._under_way = 0
        self._ended = trio.lowlevel.ParkingLot()

    async def move(
        self, fd: int, position: int, buffer: memoryview, address: int, *, writing: bool
    ) -> None:
        if writing:
            await self._run(partial(write_all, fd, buffer, position))
        else:
            await self._run(partial(read_exactly, fd, buffer, position, wait=True))

    async def sync(self, fd: int) -> None:
        await self._run(partial(os.fdatasync, fd))

    async def drain(self) -> None:
        while self._under_way:
            await self._ended.park()

    def close(self) -> None:
        assert not self._under_way

    async def _run(self, work: Callable[[], object]) -> None:
        self._under_way += 1
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._under_way -= 1
            self._ended.unpark_all()
