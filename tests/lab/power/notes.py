"""What was promised before a power cut, kept where the cut does not reach: on the lab's host.

The guest writes through 9p, uncached: a note is on the host when the call returns.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple


class Settled(NamedTuple):
    """A round whose files have been checked and synced after its power cut."""

    round: int
    steps: list[int]
    """Of each worker: after which step its files are."""
    dropped: list[list[str]]
    """Of each worker: files that had lost blocks, as they may, and were removed."""


class Promises(NamedTuple):
    acknowledged: int
    """Steps that had returned."""
    durable: int
    """The last of them that was to outlive a power cut."""


class Notes:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def last_round(self) -> int:
        """The last round that was under load; 0: there was none."""
        return max(
            (int(path.stem.split("-")[1]) for path in self._directory.glob("round-*-0")), default=0
        )

    def acknowledgements(self, number: int, worker: int) -> int:
        """A descriptor for a worker's notes: one byte a step, ``d`` for a durable one."""
        path = self._directory / f"round-{number}-{worker}"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def promises(self, number: int, worker: int) -> Promises:
        noted = (self._directory / f"round-{number}-{worker}").read_bytes()
        return Promises(len(noted), noted.rfind(b"d") + 1)

    def settled(self) -> Settled | None:
        path = self._directory / "settled.json"
        return Settled(**json.loads(path.read_text())) if path.exists() else None

    def settle(self, settled: Settled) -> None:
        """In place of the one before."""
        path = self._directory / "settled.json"
        path.with_suffix(".new").write_text(json.dumps(settled._asdict()))
        path.with_suffix(".new").rename(path)
