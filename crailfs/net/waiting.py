"""Short waits in place, for a peer that answers sooner than a sleeping processor wakes up.

Waking a processor that has gone idle costs about 30 us in a virtual machine, several times what a
small request costs. So while requests follow each other closely both ends keep looking instead of
sleeping, for a bounded time, and give the processor to anybody else who wants it meanwhile.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

SPIN_S: Final = 0.000_1
SKIPPED_AFTER_MISS: Final = 8


class Spinner:
    """Looks whether a descriptor is ready for at most ``SPIN_S``; where that was in vain lately,
    not at all, so that a slow or rare peer costs little."""

    def __init__(self, fd: int) -> None:
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._to_skip = 0

    def wait(self) -> bool:
        """Whether the descriptor became readable (or its connection ended)."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        poll, sched_yield, now = self._poll.poll, os.sched_yield, time.perf_counter
        end_s = now() + SPIN_S
        while not poll(0):
            if now() > end_s:
                self._to_skip = SKIPPED_AFTER_MISS
                return False
            sched_yield()
        return True
