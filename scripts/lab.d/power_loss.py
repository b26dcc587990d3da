"""Power loss: QEMU is killed at random instants under load, and what is left is verified.

A round boots a guest on the media that the last round left, verifies them, starts the load and
kills QEMU at a random instant after the load has said that it is under way. One more boot verifies
what the last round left.

What the emulation does not show: the media keep every store that the guest made, also one that was
never flushed out of a cache of its CPU or of its NVMe disk, because the host keeps those. So this
finds a wrong order and half-done changes, not a missing flush.
"""

from __future__ import annotations

import contextlib
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import junit
import machine
import runs
import scratch
import source
from channel import GuestError
from image import Image
from processes import dies_with_us

UNDER_LOAD = b"UNDER LOAD"
"""What a load prints once, when killing it from now on is of interest."""
VERIFY_LIMIT_S = 300
LOAD_STARTS_WITHIN_S = 240


@dataclass(frozen=True)
class PowerLoss:
    """What to run; ``load`` and ``verify`` are command lines for the guest's checkout."""

    name: str
    rounds: int
    load: str
    verify: str
    seed: int
    kill_within_s: float
    """QEMU is killed at most this long after UNDER_LOAD."""
    limit_s: float
    fsdax: bool = False


def power_loss(image: Image, plan: PowerLoss, results: Path) -> int:
    """Runs the rounds; ``results/NAME.xml`` has a test case for each boot. Returns 0 or 1.

    Load and verification find in their environment: CRAIL_LAB_ROUND (from 0) and, from the second
    boot on, CRAIL_LAB_LAST_LOAD, a file with everything that the killed load had printed.
    """
    print(f"lab: {plan.name}: {plan.rounds} power losses, seed {plan.seed}", flush=True)
    began = time.monotonic()
    directory = runs.fresh_directory(results, plan.name)
    cases: list[junit.Case] = []
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(scratch.directory())
        source.make_disk(image, files / "source.img")
        media = machine.Media.in_directory(
            files / "media",
            devdax_mib=runs.DEVDAX_MIB,
            nvme_mib=runs.NVME_MIB,
            fsdax_mib=runs.FSDAX_MIB if plan.fsdax else 0,
        )
        rounds = _Rounds(image, plan, files / "source.img", media, directory, began)
        for number in range(plan.rounds + 1):
            boot_began = time.monotonic()
            message, details = None, ""
            try:
                rounds.boot(number)
            except GuestError as error:
                message = f"{plan.name}, seed {plan.seed}, boot {number}: {error}"
                details = runs.tails(directory)
                print(f"lab: {message}\n{details}", flush=True)
                kept = directory / "media"
                # A cp that keeps holes: the files are mostly holes.
                subprocess.run(
                    ["cp", "-r", "--sparse=always", str(files / "media"), str(kept)], check=True
                )
                print(f"lab: {plan.name}: the media are in {kept}", flush=True)
            cases.append(
                junit.Case(f"boot-{number}", time.monotonic() - boot_began, message, details)
            )
            if message is not None:
                break
    junit.write(results / f"{plan.name}.xml", plan.name, cases)
    survived = sum(case.message is None for case in cases[1:])
    seconds = time.monotonic() - began
    print(f"lab: {plan.name}: {survived} power losses survived in {seconds:.0f} s", flush=True)
    return int(cases[-1].message is not None)


def in_lanes(plan: PowerLoss, lanes: int, results: Path) -> int:
    """Runs the rounds in ``lanes`` guests at a time, each with media and a seed of its own."""
    runs.fresh_directory(results, plan.name)
    children = []
    for lane in range(lanes):
        rounds = plan.rounds // lanes + (lane < plan.rounds % lanes)
        part = replace(plan, name=f"{plan.name}-{lane + 1}", rounds=rounds, seed=plan.seed + lane)
        argv = [sys.executable, str(Path(__file__).parent), "power-loss", "--name", part.name]
        argv += ["--rounds", str(part.rounds), "--seed", str(part.seed), "--load", part.load]
        argv += ["--verify", part.verify, "--kill-within", str(part.kill_within_s)]
        argv += ["--limit", str(part.limit_s), *(["--fsdax"] if part.fsdax else [])]
        argv += ["--results", str(results / plan.name)]
        child = subprocess.Popen(argv, preexec_fn=dies_with_us())  # noqa: PLW1509 - one thread
        children.append(child)
    codes = [child.wait() for child in children]
    parts = [results / plan.name / f"{plan.name}-{lane + 1}.xml" for lane in range(lanes)]
    junit.merge(parts, results / f"{plan.name}.xml")
    return int(any(codes))


class _Rounds:
    def __init__(
        self,
        image: Image,
        plan: PowerLoss,
        source_disk: Path,
        media: machine.Media,
        directory: Path,
        began: float,
    ) -> None:
        self._image = image
        self._plan = plan
        self._source = source_disk
        self._media = media
        self._directory = directory
        self._deadline = began + plan.limit_s
        self._instants = random.Random(plan.seed)

    def boot(self, number: int) -> None:
        """Verifies, then (but for the last boot) loads and kills.

        Raises:
            GuestError: the verification failed, or the guest or the load did not do as it should.
        """
        env = {"CRAIL_LAB_ROUND": str(number)}
        if number:
            env["CRAIL_LAB_LAST_LOAD"] = f"/lab/out/load-{number - 1}.log"
        with contextlib.ExitStack() as stack:
            (guest,) = machine.boot(stack, self._start)
            log = stack.enter_context(open(self._directory / "output.log", "ab"))
            log.write(f"--- boot {number}\n".encode())
            # Before the first load as well: the verification makes what it needs on fresh media.
            until = min(self._deadline, time.monotonic() + VERIFY_LIMIT_S)
            code = guest.channel.run(shlex.split(self._plan.verify), until, runs.Output(log), env)
            if code:
                raise GuestError(f"the verification failed with {code}")
            if number < self._plan.rounds:
                with open(guest.out / f"load-{number}.log", "wb") as said:
                    self._load(guest, env, said)

    def _start(self, stack: contextlib.ExitStack) -> list[machine.Starting]:
        starting = machine.start(
            self._image,
            self._source,
            self._media,
            self._directory / "guest1",
            machine.Shape(cpus=1, memory_mib=1536),
        )
        stack.callback(starting.kill)
        return [starting]

    def _load(self, guest: machine.Machine, env: dict[str, str], said: BinaryIO) -> None:
        guest.channel.begin(shlex.split(self._plan.load), env)
        until = min(self._deadline, time.monotonic() + LOAD_STARTS_WITHIN_S)
        kill_at = None
        last_words = b""
        while True:
            event = guest.channel.event(kill_at or until)
            if isinstance(event, int):
                end = last_words.decode(errors="replace")
                raise GuestError(f"the load ended by itself with {event}:\n{end}")
            if event is None:
                break
            said.write(event)
            last_words = (last_words + event)[-4000:]
            if kill_at is None and UNDER_LOAD in last_words:
                kill_at = time.monotonic() + self._instants.uniform(0, self._plan.kill_within_s)
        if kill_at is None:
            end = last_words.decode(errors="replace")
            raise GuestError(f"the load did not say {UNDER_LOAD.decode()}:\n{end}")
        guest.power_off()
        guest.channel.drain(said.write)
