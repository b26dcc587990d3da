"""Short waits in place, for a peer that answers sooner than a sleeping processor wakes up.

Waking a processor that has gone idle costs about 30 us in a virtual machine, several times what a
small request costs. So while requests follow each other closely both ends keep looking instead of
sleeping, and yield the processor between looks, often to their own peer. That is a bad bargain
where other programs want the processor: who yields to them waits for a whole time slice of theirs,
while who sleeps is woken before them. So a yield that took long ends the looking for a good while.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

SPIN_S: Final = 0.000_3
"""How long to look."""
LONG_YIELD_S: Final = 0.001
"""A yield that took longer went to another program (or to a peer that has much to do)."""
SKIPPED_WHEN_LATE: Final = 2
"""Waits without looking after one in which the peer was not ready in time."""
SKIPPED_WHEN_CONTENDED_MAX: Final = 512
"""Most waits without looking after a long yield: four times as many from one to the next."""


class Spinner:
    """Looks whether a descriptor is ready for at most ``SPIN_S``; where that was in vain lately,
    not at all, so that a slow or rare peer costs little."""

    def __init__(self, fd: int) -> None:
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._to_skip = 0
        self._skipped_when_contended = SKIPPED_WHEN_LATE

    def wait(self) -> bool:
        """Whether the descriptor is readable (or its connection has ended)."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        poll, sched_yield, now = self._poll.poll, os.sched_yield, time.perf_counter
        looked_s = now()
        end_s = looked_s + SPIN_S
        while not poll(0):
            if looked_s > end_s:
                self._to_skip = SKIPPED_WHEN_LATE
                return False
            sched_yield()
            yielded_s = now()
            if yielded_s - looked_s > LONG_YIELD_S:
                self._contended()
                return bool(poll(0))
            looked_s = yielded_s
        if self._skipped_when_contended > SKIPPED_WHEN_LATE:
            self._skipped_when_contended -= 1
        return True

    def _contended(self) -> None:
        self._to_skip = self._skipped_when_contended
        self._skipped_when_contended = min(4 * self._to_skip, SKIPPED_WHEN_CONTENDED_MAX)
