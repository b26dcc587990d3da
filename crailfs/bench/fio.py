"""``fio``, the usual program for measuring disks, as something to compare with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from crailfs.errors import CrailError
from crailfs.units import KIB, MIB

_TIMEOUT_SECONDS: Final = 120.0
"""What a run may take beyond the time it was given."""


class Pattern(NamedTuple):
    """What is asked of a disk, over and over, with ``depth`` requests under way at any time."""

    name: str
    unit: str
    """``MB/s`` (10^6 bytes) or ``IOPS``."""
    block_bytes: int
    depth: int
    is_write: bool
    is_random: bool

    @property
    def fio_name(self) -> str:
        return ("rand" if self.is_random else "") + ("write" if self.is_write else "read")


PATTERNS: Final = (
    Pattern("write 128 KiB", "MB/s", 128 * KIB, 32, is_write=True, is_random=False),
    Pattern("read 128 KiB", "MB/s", 128 * KIB, 32, is_write=False, is_random=False),
    Pattern("write 1 MiB", "MB/s", MIB, 8, is_write=True, is_random=False),
    Pattern("read 1 MiB", "MB/s", MIB, 8, is_write=False, is_random=False),
    Pattern("random write 4 KiB", "IOPS", 4 * KIB, 32, is_write=True, is_random=True),
    Pattern("random read 4 KiB", "IOPS", 4 * KIB, 32, is_write=False, is_random=True),
)


def missing() -> str | None:
    """Why there is no fio here; None: there is."""
    if shutil.which("fio") is None:
        return "fio is not installed (apt install fio)"
    return None


async def run(path: Path, size_bytes: int, pattern: Pattern, seconds: float) -> float:
    """``pattern`` on the file ``path`` of ``size_bytes``, over and over for ``seconds``, in the
    pattern's unit.

    Raises:
        CrailError: fio failed, or did not end in time; says what it said.
    """
    clock = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    return await _run(path, size_bytes, pattern, *clock, limit_seconds=seconds + _TIMEOUT_SECONDS)


async def fill(path: Path, size_bytes: int) -> None:
    """Make the file. Raises as ``run`` does."""
    in_a_row = Pattern("filling", "MB/s", MIB, 8, is_write=True, is_random=False)
    await _run(path, size_bytes, in_a_row, limit_seconds=_TIMEOUT_SECONDS)


async def _run(
    path: Path, size_bytes: int, pattern: Pattern, *options: str, limit_seconds: float
) -> float:
    command = [
        "fio",
        "--name=crail-bench",
        f"--filename={path}",
        f"--size={size_bytes}",
        f"--rw={pattern.fio_name}",
        f"--bs={pattern.block_bytes}",
        f"--iodepth={pattern.depth}",
        "--ioengine=io_uring",
        "--direct=1",
        "--randrepeat=0",
        "--norandommap",
        "--output-format=json",
        *options,
    ]
    try:
        with trio.fail_after(limit_seconds):
            done = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False
            )
    except trio.TooSlowError:
        raise CrailError(f"fio: {pattern.name}: not done within {limit_seconds:.0f} s") from None
    said = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise CrailError(
            f"fio: {pattern.name}: exit code {done.returncode}: "
            f"{done.stderr.decode(errors='replace').strip() or said.strip()}"
        )
    # What it has to say to people may come before the JSON.
    document: dict[str, Any] = json.loads(said[said.index("{") :])
    figures = document["jobs"][0]["write" if pattern.is_write else "read"]
    return float(figures["iops"] if pattern.unit == "IOPS" else figures["bw_bytes"] / 1e6)
