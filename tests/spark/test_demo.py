"""``scripts/demo``: a small run, and one that is interrupted. (It is started without the script,
which would install packages.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(400)]

DEMO = [sys.executable, "-u", "-m", "crailfs.spark_jobs.demo", "--scale", "0.01"]
REPOSITORY = Path(__file__).resolve().parents[2]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )


def directory_of(lines: Sequence[str]) -> Path:
    (line,) = (line for line in lines if " is up after " in line)
    return Path(line.split(" ")[0]).parent


def assert_nothing_is_left(directory: Path) -> None:
    assert directory.name.startswith("crail-demo-")
    assert not directory.exists()
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    mark = os.fsencode(directory)
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            assert mark not in Path("/proc", process, "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def test_both_jobs_run_and_nothing_is_left() -> None:
    process = start()
    output, _ = process.communicate(timeout=380)
    assert process.returncode == 0, output

    lines = output.splitlines()
    for job in ("TeraSort", "TPC-DS query 77"):
        (line,) = (line for line in lines if line.startswith(job) and "memory" in line)
        cells = line.removeprefix(job).split()
        on_the_mount, on_disk, ratio = float(cells[0]), float(cells[2]), float(cells[4])
        assert ratio == pytest.approx(on_the_mount / on_disk, abs=0.2)
    assert "Both answers are equal" in output
    assert_nothing_is_left(directory_of(lines))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals) -> None:
    process = start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("TeraSort on the mount"):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + output
    assert "interrupted: everything was taken down" in output
    assert_nothing_is_left(directory_of(lines))
