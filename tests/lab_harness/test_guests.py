"""What the lab says when a guest panics or hangs, and that nothing of it outlives it.

Boots guests, so it is a run of the lab (tests/lab/plan.toml) and skipped elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOT_S = 200

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("CRAIL_LAB") != "harness", reason="boots guests: scripts/lab runs it"
    ),
    pytest.mark.timeout(600),
]


def lab(tmp_path: Path, *arguments: str) -> list[str]:
    # Killed at its time limit, pytest has no chance to end what it started.
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
    command = [str(ROOT / "scripts/lab"), "exec", "--results", str(tmp_path)]
    return [*dies_with_us, *command, *arguments]


def failure(report: Path) -> ElementTree.Element:
    found = ElementTree.parse(report).getroot().find(".//failure")
    assert found is not None
    return found


def test_a_panic_is_told_with_the_consoles_tail(tmp_path: Path) -> None:
    panic = ["sh", "-c", "echo about to panic; sleep 2; echo c >/proc/sysrq-trigger; sleep 1000"]
    done = subprocess.run(
        lab(tmp_path, "--name", "panic", "--limit", str(BOOT_S), "--", *panic),
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1
    assert "ended by itself" in done.stdout
    assert "Kernel panic" in done.stdout
    told = failure(tmp_path / "panic.xml")
    assert "Kernel panic" in (told.text or "")
    assert "about to panic" in (told.text or "")


HANG = ("sh", "-c", "echo hanging >/lab/out/mark; sleep 1000")


def test_a_hang_ends_at_the_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        lab(tmp_path, "--name", "hang", "--limit", "45", "--", *HANG),
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1
    assert "not done within its time limit" in str(failure(tmp_path / "hang.xml").get("message"))
    assert time.monotonic() - began < BOOT_S + 60
    assert (tmp_path / "hang/guest1/out/mark").read_text() == "hanging\n"


def test_a_killed_lab_leaves_no_guest(tmp_path: Path) -> None:
    process = subprocess.Popen(
        lab(tmp_path, "--name", "killed", "--", *HANG), stdout=subprocess.DEVNULL
    )
    console = tmp_path / "killed/guest1/console.log"
    try:
        wait_until(lambda: bool(guests_of(console)), BOOT_S)
    except BaseException:
        process.terminate()
        raise
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not guests_of(console), 10)


def guests_of(console: Path) -> list[int]:
    """QEMU processes that write to this console."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if line.startswith(b"qemu") or b"/qemu-system" in line.split(b"\0")[0]:
            found += [int(path.parent.name)] if os.fsencode(console) in line else []
    return found


def wait_until(true: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "not within the time limit"
        time.sleep(0.1)
