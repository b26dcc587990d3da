"""A block device that a file stands behind, for tests of whole devices."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def loop_device(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Skips the test where none can be made: that takes root and /dev/loop-control."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop devices here: they take root and /dev/loop-control")
    if shutil.which("losetup") is None:
        pytest.skip("losetup (package util-linux) is not installed")
    backing = directory / "device"
    with backing.open("wb") as file:
        file.truncate(size_bytes)
    made = _losetup("--find", "--show", str(backing))
    if made.returncode != 0:
        pytest.skip(f"no loop device can be made: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        _losetup("--detach", str(device))


def _losetup(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["losetup", *arguments], capture_output=True, text=True, check=False, timeout=20
    )
