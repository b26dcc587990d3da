"""A progress display for whatever takes more than two seconds."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

_SILENT_SECONDS: Final = 2.0
_TERMINAL_INTERVAL_SECONDS: Final = 0.1
_LINE_INTERVAL_SECONDS: Final = 5.0
_BAR_WIDTH: Final = 28
_TOLD_FROM: Final = 0.05
"""Of less than this part, what is left cannot be told."""


class Progress:
    """A bar with elapsed and remaining time on a terminal; elsewhere a line every few seconds.

    Use it as a context manager, so that the bar is gone afterwards.
    """

    def __init__(self, title: str, *, out: TextIO | None = None) -> None:
        self.title = title
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._began = time.monotonic()
        self._next_at = self._began + _SILENT_SECONDS
        self._shown_width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown_width:
            self._out.write("\r" + " " * self._shown_width + "\r")
            self._out.flush()

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._began

    def show(self, fraction: float | None, detail: str = "") -> None:
        """Show the state if it is time to.

        Args:
            fraction: what is done, 0 to 1; None: not known, only the elapsed time is shown.
            detail: what is being done right now.
        """
        now = time.monotonic()
        if now < self._next_at:
            return
        elapsed = now - self._began
        parts = [self.title]
        if fraction is not None:
            fraction = min(max(fraction, 0.0), 1.0)
            if self._terminal:
                filled = round(fraction * _BAR_WIDTH)
                parts.append(f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}]")
            parts.append(f"{fraction:4.0%}")
        parts.append(f"{_clock(elapsed)} elapsed")
        if fraction is not None and fraction >= _TOLD_FROM:
            parts.append(f"{_clock(elapsed / fraction - elapsed)} to go")
        if detail:
            parts.append(detail)
        line = "  ".join(parts)
        if self._terminal:
            self._out.write("\r" + line.ljust(self._shown_width))
            self._shown_width = len(line)
            self._next_at = now + _TERMINAL_INTERVAL_SECONDS
        else:
            self._out.write(line + "\n")
            self._next_at = now + _LINE_INTERVAL_SECONDS
        self._out.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
