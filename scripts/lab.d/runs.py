"""A run: one or two guests, a pytest selection in the last of them, results as JUnit XML."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import junit
import machine
import scratch
import source
from channel import GuestError
from image import Image

DEVDAX_MIB = 1024
FSDAX_MIB = 512
NVME_MIB = 1024
PYTEST = ("python3", "-m", "pytest", "-p", "no:cacheprovider", "--color=no")


@dataclass(frozen=True)
class Run:
    """What to run and where its results go."""

    name: str
    guests: int
    """1 or 2; 0 in the plan: pytest runs on the host, to test this harness itself."""
    arguments: Sequence[str]
    limit_s: float
    fsdax: bool = False
    plain: bool = False
    """``arguments`` are a command of its own, not pytest's."""


def suite(run: Run) -> list[str]:
    """pytest's option that names the report's suite after the run."""
    return ["-o", f"junit_suite_name={run.name}"]


class Output:
    """Writes what a guest says to its log and to standard output."""

    def __init__(self, log: BinaryIO) -> None:
        self._log = log

    def __call__(self, chunk: bytes) -> None:
        for file in (self._log, sys.stdout.buffer):
            file.write(chunk)
            file.flush()


def fresh_directory(results: Path, name: str) -> Path:
    """An empty directory for a run's logs, in the place of an earlier run's; without its report."""
    directory = results / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (results / f"{name}.xml").unlink(missing_ok=True)
    return directory


def in_guests(image: Image, run: Run, results: Path) -> int:
    """Runs ``run``; ``results/NAME.xml`` has its results, ``results/NAME/`` its logs.

    Returns the command's exit code, or 1 when a guest died or was not done in time.
    """
    began = time.monotonic()
    directory = fresh_directory(results, run.name)
    report = results / f"{run.name}.xml"
    pytest = [] if run.plain else [*PYTEST, *suite(run), "--junitxml=/lab/out/junit.xml"]
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(scratch.directory())
        source.make_disk(image, files / "source.img")
        log = stack.enter_context(open(directory / "output.log", "wb"))
        try:
            guests = machine.boot(
                stack, lambda started: _start(started, image, run, files, directory)
            )
            took = ", ".join(f"{guest.booted_s:.1f} s" for guest in guests)
            print(f"lab: {run.name}: {run.guests} guest(s) booted in {took}", flush=True)

            def check() -> None:
                for guest in guests:
                    if guest.process.poll() is not None:
                        raise GuestError(f"{guest.directory.name} ended by itself during the run")

            command = [*pytest, *run.arguments]
            deadline = began + run.limit_s
            code = guests[-1].channel.run(command, deadline, Output(log), check=check)
            check()
        except GuestError as error:
            message, details = f"{run.name}: {error}", tails(directory)
            print(f"lab: {message}\n{details}", flush=True)
            case = junit.Case("guests", time.monotonic() - began, message, details)
            junit.write(report, run.name, [case])
            return 1
        written = guests[-1].out / "junit.xml"
        if written.exists():
            shutil.copy(written, report)
        elif not run.plain:
            case = junit.Case("pytest", 0, f"pytest ended with {code} and wrote no report")
            junit.write(report, run.name, [case])
            return code or 1
        return code


def _start(
    stack: contextlib.ExitStack, image: Image, run: Run, files: Path, directory: Path
) -> list[machine.Starting]:
    """The guests of ``run``, which ``stack`` kills at its end."""
    cables = machine.two_ends() if run.guests == 2 else (None,)
    starting = []
    for node, cable in enumerate(cables, 1):
        media = machine.Media.in_directory(
            files / f"guest{node}",
            devdax_mib=DEVDAX_MIB,
            nvme_mib=NVME_MIB,
            fsdax_mib=FSDAX_MIB if run.fsdax else 0,
        )
        shape = (
            machine.Shape(node=node, nodes=2, cpus=1, memory_mib=1536)
            if run.guests == 2
            else machine.Shape()
        )
        guest_directory = directory / f"guest{node}"
        one = machine.start(image, files / "source.img", media, guest_directory, shape, cable)
        stack.callback(one.kill)
        starting.append(one)
    for cable in cables:
        if cable is not None:
            cable.close()
    return starting


def tails(directory: Path) -> str:
    """The ends of the consoles and of the output in a run's directory."""
    parts = []
    for guest in sorted(directory.glob("guest*")):
        parts.append(f"--- the end of {guest.name}'s console\n{machine.console_tail(guest)}")
    log = directory / "output.log"
    output = log.read_text(errors="replace").splitlines() if log.exists() else []
    parts.append("--- the end of the output\n" + "\n".join(output[-20:]))
    return "\n".join(parts)
