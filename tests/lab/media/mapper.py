"""A device-mapper device over a real one, whose table a test changes under its user."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SECTOR_BYTES: Final = 512
_NAME: Final = "crail-test"


class Mapped:
    """``path`` is the device."""

    def __init__(self, below: Path) -> None:
        self.path = Path("/dev/mapper", _NAME)
        self._below = below
        self._made = False
        answer = _run("blockdev", "--getsz", str(below))
        self._sectors = int(answer)

    def linear(self) -> None:
        """All of it works."""
        self._load([f"0 {self._sectors} linear {self._below} 0"])

    def failing(self, begin: int, end: int) -> None:
        """Bytes ``begin`` to ``end`` can be neither read nor written."""
        first, after = begin // SECTOR_BYTES, end // SECTOR_BYTES
        self._load(
            [
                f"0 {first} linear {self._below} 0",
                f"{first} {after - first} error",
                f"{after} {self._sectors - after} linear {self._below} {after}",
            ]
        )

    def slow_to_write(self, delay_ms: int) -> None:
        """A write arrives so much later."""
        self._load([f"0 {self._sectors} delay {self._below} 0 0 {self._below} 0 {delay_ms}"])

    def _load(self, table: Sequence[str]) -> None:
        if self._made:
            _run("dmsetup", "--noudevsync", "suspend", _NAME)
            _run("dmsetup", "--noudevsync", "load", _NAME, table="\n".join(table))
            _run("dmsetup", "--noudevsync", "resume", _NAME)
        else:
            _run("dmsetup", "--noudevsync", "create", _NAME, table="\n".join(table))
            _run("dmsetup", "mknodes", _NAME)
            self._made = True


@contextlib.contextmanager
def mapped(below: Path) -> Iterator[Mapped]:
    """All of it works at first."""
    device = Mapped(below)
    device.linear()
    try:
        yield device
    finally:
        _run("dmsetup", "--noudevsync", "remove", "--retry", "--force", _NAME)


def _run(*command: str, table: str = "") -> str:
    done = subprocess.run(
        command, input=table, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
