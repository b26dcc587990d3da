"""Log lines about peers' faults, so few that a thousand bad peers cannot flood the log."""

from __future__ import annotations

import logging
import time
from typing import Final

LINES_PER_PERIOD: Final = 20
PERIOD_S: Final = 10.0


class LimitedLog:
    """Passes on the first ``LINES_PER_PERIOD`` lines of each period and counts the rest."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._period_end = 0.0
        self._lines = 0

    def warning(self, text: str, *values: object) -> None:
        now = time.monotonic()
        if now >= self._period_end:
            self.report_dropped()
            self._period_end = now + PERIOD_S
        self._lines += 1
        if self._lines <= LINES_PER_PERIOD:
            self._log.warning(text, *values)

    def report_dropped(self) -> None:
        """Says how many lines of the period that ends were left out, if any were."""
        dropped = self._lines - LINES_PER_PERIOD
        self._lines = 0
        if dropped > 0:
            self._log.warning("%d more messages of this kind were left out", dropped)
