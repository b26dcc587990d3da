"""The whole lab: what tests/lab/plan.toml lists, within a time limit for all of it."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import junit
from image import CHECKOUT
from machine import panicked
from power_loss import PowerLoss
from runs import Run

PLAN = CHECKOUT / "tests/lab/plan.toml"
SUMMARY = "summary.txt"
"""In the results: a line for each step, or one that says why nothing was tested."""


@dataclass(frozen=True)
class Plan:
    """What there is to run, in order."""

    runs: Sequence[Run]
    power_losses: Sequence[tuple[PowerLoss, int]]
    """Each with how many guests run at a time."""


@dataclass(frozen=True)
class Step:
    """Something to run, which writes a report of its name."""

    name: str
    limit_s: float
    run: Callable[[float], int]
    """Runs it within this many seconds; returns an exit code."""


def read(seed: int) -> Plan:
    """The plan; ``seed`` is the power losses'."""
    told = tomllib.loads(PLAN.read_text())
    runs = [
        Run(
            name=one["name"],
            guests=one.get("guests", 1),
            arguments=["-v", *one["tests"]],
            limit_s=one["limit_s"],
            fsdax=one.get("fsdax", False),
        )
        for one in told.get("run", ())
    ]
    power_losses = [
        (
            PowerLoss(
                name=one["name"],
                rounds=one["rounds"],
                load=one["load"],
                verify=one["verify"],
                seed=seed,
                kill_within_s=one["kill_within_s"],
                limit_s=one["limit_s"],
            ),
            one.get("lanes", 2),
        )
        for one in told.get("power_loss", ())
    ]
    return Plan(runs, power_losses)


def carry_out(steps: Sequence[Step], limit_s: float, results: Path) -> int:
    """Runs the steps within ``limit_s`` in all; each within what is left, at most its own limit.

    Merges their reports into ``results/junit.xml``, prints a line for each and writes them to
    ``results/SUMMARY``. Returns 0 when all passed, and each ran at least one test. A step whose
    guest's kernel panicked is run once more: an emulated processor breaks one now and then
    (docs/operations.md). Its line says so.
    """
    deadline = time.monotonic() + limit_s
    lines = []
    failed = False
    reports = []
    for step in steps:
        began = time.monotonic()
        left_s = deadline - began
        repeated = ""
        report = results / f"{step.name}.xml"
        reports.append(report)
        if left_s <= 0:
            message = f"not run: the lab's {limit_s:.0f} s were over"
            results.mkdir(parents=True, exist_ok=True)
            junit.write(report, step.name, [junit.Case("run", 0, message)])
            code = 1
        else:
            code, repeated = _attempt(step, deadline, results)
        counts = junit.counts(report) if report.exists() else {}
        ran = counts.get("tests", 0) - counts.get("skipped", 0)
        passed = code == 0 and ran > 0
        failed = failed or not passed
        what = ", ".join(f"{count} {word}" for word, count in counts.items())
        verdict = "passed" if passed else "FAILED" if ran else "FAILED: no test ran"
        lines.append(
            f"lab: {step.name:12} {time.monotonic() - began:5.0f} s  {verdict} ({what}){repeated}"
        )
    junit.merge(reports, results / "junit.xml")
    (results / SUMMARY).write_text("".join(f"{line}\n" for line in lines))
    print("\n".join(["", *lines, f"lab: results and logs are in {results}"]), flush=True)
    return int(failed)


def _attempt(step: Step, deadline: float, results: Path) -> tuple[int, str]:
    """Its exit code, and what is to be said of a first attempt."""
    kept = results / f"{step.name}-panicked"
    shutil.rmtree(kept, ignore_errors=True)
    code = step.run(min(step.limit_s, deadline - time.monotonic()))
    left_s = deadline - time.monotonic()
    if not code or left_s <= 0 or not panicked(results / step.name):
        return code, ""
    (results / step.name).rename(kept)
    print(f"lab: {step.name}: a guest's kernel panicked ({kept}); once more", flush=True)
    return step.run(min(step.limit_s, left_s)), f"; once more after a guest's panic: {kept.name}"
