"""This host's own devices in place of a guest's: ``scripts/lab --host lab.toml``."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import junit
import runs
from image import CHECKOUT
from processes import dies_with_us

CONSENT = "i_know_that_these_devices_are_overwritten"
DEVICES = {
    "devdax": "CRAIL_LAB_DEVDAX",
    "fsdax": "CRAIL_LAB_FSDAX",
    "nvme": "CRAIL_LAB_NVME",
    "rdma_device": "CRAIL_LAB_RDMA_DEVICE",
    "nic": "CRAIL_LAB_NIC",
    "address": "CRAIL_LAB_ADDRESS",
    "peer": "CRAIL_LAB_PEER",
    "peer_agent": "CRAIL_LAB_PEER_AGENT",
}
"""Keys of the file, and what tests find them as (tests/lab/conftest.py says what each is)."""


def environment(file: Path) -> dict[str, str]:
    """What ``file`` names, as a test's environment.

    Raises:
        SystemExit: it cannot be read, lacks the consent, or has something unknown.
    """
    try:
        told = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"lab: {file} cannot be read: {error}") from error
    if told.pop(CONSENT, None) is not True:
        raise SystemExit(
            f"lab: the tests overwrite every device that {file} names; if they may, "
            f"add the line {CONSENT} = true"
        )
    if unknown := sorted(set(told) - set(DEVICES)):
        raise SystemExit(
            f"lab: {file} has {', '.join(unknown)}; it may have {', '.join(sorted(DEVICES))}"
        )
    for key, value in told.items():
        if not isinstance(value, str) or not value:
            raise SystemExit(f"lab: {file}: {key} must be a string that is not empty")
    for key in ("devdax", "fsdax", "nvme"):
        if key in told and not Path(told[key]).exists():
            raise SystemExit(f"lab: {file}: {key}: {told[key]} does not exist")
    return {DEVICES[key]: value for key, value in told.items()} | {"CRAIL_LAB": "host"}


def on_this_host(devices: dict[str, str], run: runs.Run, results: Path) -> int:
    """Runs ``run`` here; returns its exit code, or 1 if it was not done in time."""
    directory = runs.fresh_directory(results, run.name)
    report = results / f"{run.name}.xml"
    command = (
        []
        if run.plain
        else [sys.executable, *runs.PYTEST[1:], *runs.suite(run), f"--junitxml={report}"]
    )
    try:
        done = subprocess.run(
            [*command, *run.arguments],
            check=False,
            cwd=CHECKOUT,
            env=os.environ | devices | {"CRAIL_LAB_OUT": str(directory)},
            timeout=run.limit_s,
            preexec_fn=dies_with_us(),
        )
    except subprocess.TimeoutExpired:
        message = f"{run.name} was not done within {run.limit_s:.0f} s"
        print(f"lab: {message}", flush=True)
        junit.write(report, run.name, [junit.Case("pytest", run.limit_s, message)])
        return 1
    return done.returncode
