"""The demonstration: the same Spark jobs on CrailFS and on a plain local directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import trio

from crailfs.bench.progress import Progress
from crailfs.bench.report import aligned
from crailfs.bench.workbench import Workbench, last_lines, raise_on_signals
from crailfs.cli.main import error_of
from crailfs.cli.operator import cluster_status, connected
from crailfs.config import ClientConfig
from crailfs.errors import CrailError
from crailfs.spark_jobs.job import (
    QUERY_77,
    TERASORT,
    JobResult,
    JobSpecification,
    clean_environment,
)
from crailfs.spark_jobs.records import RECORD_BYTES, Digest
from crailfs.spark_jobs.tpcds import Answer
from crailfs.units import GIB, format_bytes

TERASORT_BYTES: Final = 2_000_000_000
_DISK_BYTES: Final = 9 * GIB
"""Input, and what one job makes of it on the local disk, at scale 1."""
_STEP_TIMEOUT_SECONDS: Final = 600.0
"""At scale 1."""
_SAMPLE_INTERVAL_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 0.2
_MOUNT: Final = "the mount"
_LOCAL: Final = "local disk"

T = TypeVar("T")


class _Run(NamedTuple):
    result: JobResult
    digest: Digest | None
    """Of TeraSort's output."""
    tier_peak_bytes: dict[str, int]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    raise_on_signals()
    try:
        with Workbench("demo") as bed:
            _Demo(bed, options).run()
            if options.keep:
                bed.keep()
                _tell_what_is_kept(bed, options)
    except KeyboardInterrupt:
        print("interrupted: everything was taken down", file=sys.stderr)
        return 130
    except CrailError as error:
        print(f"demo: {error.message}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Runs TeraSort and TPC-DS query 77 on Spark, with spark.local.dir on CrailFS "
        "and on the local disk, and compares answers and times.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="F",
        help="how much data: 1 is TPC-DS at scale factor 1 and 2 GB of TeraSort records (default)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="after a good run leave the file system up and the data in place",
    )
    parser.add_argument(
        "--on",
        type=Path,
        metavar="DIR",
        help="run on this directory (a cluster's mount, say) and bring no file system up",
    )
    options = parser.parse_args(arguments)
    if not options.scale > 0:
        parser.error("--scale must be more than 0")
    return options


class _Demo:
    def __init__(self, bed: Workbench, options: argparse.Namespace) -> None:
        self._bed = bed
        self._scale: float = options.scale
        self._timeout_seconds = _STEP_TIMEOUT_SECONDS * max(1.0, self._scale)
        self._input = bed.directory / "input"
        self._own_mount = options.on is None
        self._places = {
            _MOUNT: (bed.mountpoint if self._own_mount else options.on.absolute())
            / f"demo-{os.getpid()}",
            _LOCAL: bed.directory / "local",
        }

    def run(self) -> None:
        self._check_space()
        if self._own_mount:
            print(self._bed.start_crail(), end="")
        try:
            expected_digest, expected_answer = self._make_input()
            # One after the other for each job: whatever else the machine does hits both alike.
            runs = {
                (job, place): self._run_job(job, place)
                for job in (TERASORT, QUERY_77)
                for place in self._places
            }
        finally:
            if not self._own_mount:
                shutil.rmtree(self._places[_MOUNT], ignore_errors=True)
        for place in self._places:
            _compare("TeraSort's output", place, runs[TERASORT, place].digest, expected_digest)
            answer = runs[QUERY_77, place].result.answer
            _compare("query 77's answer", place, answer, expected_answer)
        self._print_table(runs)

    def _check_space(self) -> None:
        needed_bytes = int(_DISK_BYTES * self._scale)
        free_bytes = shutil.disk_usage(self._bed.directory).free
        if free_bytes < needed_bytes:
            raise CrailError(
                f"{self._bed.directory.parent} has {format_bytes(free_bytes)} free, and the demo "
                f"needs {format_bytes(needed_bytes)}: free some, or give a smaller --scale"
            )

    def _make_input(self) -> tuple[Digest, Answer]:
        record_count = max(round(TERASORT_BYTES * self._scale / RECORD_BYTES), 1)
        self._input.mkdir()
        digest = self._data(
            f"making {format_bytes(record_count * RECORD_BYTES)} of TeraSort records",
            Digest,
            "make-records",
            str(self._input / TERASORT),
            str(record_count),
        )
        answer = self._data(
            f"making TPC-DS at scale factor {self._scale:g}",
            Answer,
            "make-tables",
            str(self._input / QUERY_77),
            str(self._scale),
        )
        return digest, answer

    def _run_job(self, job: str, place: str) -> _Run:
        directory = self._places[place]
        specification = JobSpecification(
            job=job,
            input_directory=str(self._input / job),
            local_directory=str(directory / "spark"),
            # In one place for both runs: all that differs is spark.local.dir.
            output_directory=str(self._bed.directory / "sorted"),
            temporary_directory=str(self._bed.temporary),
            result_file=str(self._bed.directory / "result.json"),
        )
        file = self._bed.directory / "specification.json"
        file.write_bytes(msgspec.json.encode(specification))
        with _peak_by_tier(self._client_config(place)) as peak_bytes:
            command = [sys.executable, "-m", "crailfs.spark_jobs.job", str(file)]
            self._follow(command, f"{job} on {place}")
        result = msgspec.json.decode(Path(specification.result_file).read_bytes(), type=JobResult)
        if job != TERASORT:
            return _Run(result, None, peak_bytes)
        digest = self._data(
            f"checking what {job} wrote to {place}",
            Digest,
            "check-records",
            specification.output_directory,
        )
        return _Run(result, digest, peak_bytes)

    def _client_config(self, place: str) -> ClientConfig | None:
        if place != _MOUNT or not self._own_mount:
            return None
        return self._bed.state.settings().client()

    def _data(self, title: str, result_type: type[T], *arguments: str) -> T:
        result_file = self._bed.directory / "data.json"
        command = [sys.executable, "-m", "crailfs.spark_jobs.data", *arguments, str(result_file)]
        self._follow(command, title)
        return msgspec.json.decode(result_file.read_bytes(), type=result_type)

    def _follow(self, command: list[str], title: str) -> None:
        """Run a step that prints its progress; it is given up at its time limit.

        Raises:
            CrailError: it failed, with the end of what it said.
        """
        log = self._bed.directory / "step.log"
        log.unlink(missing_ok=True)
        environment = clean_environment(self._bed.temporary)
        process = self._bed.start(command, log, environment)
        assert process.stdout is not None
        fraction, unread = None, b""
        with Progress(title) as progress:
            while True:
                progress.show(fraction)
                if progress.elapsed_seconds > self._timeout_seconds:
                    raise CrailError(f"{title}: not done after {self._timeout_seconds:.0f} s")
                if not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
                    continue
                piece = os.read(process.stdout.fileno(), 4096)
                if not piece:
                    break
                *lines, unread = (unread + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"progress "):
                        # Falls back when Spark finds out about another stage.
                        fraction = float(line.split()[1])
        self._bed.finish(process)
        if process.returncode != 0:
            said = last_lines(log.read_text(errors="replace"))
            raise CrailError(f"{title} failed with exit code {process.returncode}:\n{said}")
        print(f"{title}: {progress.elapsed_seconds:.0f} s", flush=True)

    def _print_table(self, runs: dict[tuple[str, str], _Run]) -> None:
        lines = [["job", _MOUNT, _LOCAL, "ratio", "shuffled", "files", "spilled", "peak by tier"]]
        for job in (TERASORT, QUERY_77):
            run, local = runs[job, _MOUNT], runs[job, _LOCAL]
            seconds, local_seconds = run.result.wall_seconds, local.result.wall_seconds
            tiers = (f"{tier} {format_bytes(size)}" for tier, size in run.tier_peak_bytes.items())
            lines.append(
                [
                    job,
                    f"{seconds:.1f} s",
                    f"{local_seconds:.1f} s",
                    f"{seconds / local_seconds:.2f}",
                    format_bytes(run.result.local_bytes),
                    str(run.result.local_files),
                    format_bytes(run.result.spilled_bytes),
                    ", ".join(tiers) or "-",
                ]
            )
        print(f"\n{aligned(lines)}")
        print(
            f"Both answers are equal on {_MOUNT} and on {_LOCAL}: TeraSort's output has every "
            "record, in order; query 77's is also DuckDB's.\n"
            "Times are the jobs' own, without Spark's start; input and output lie on the local "
            "disk in both runs, and spark.local.dir is all that differs."
        )


def _compare(what: str, place: str, found: object, expected: object) -> None:
    if found != expected:
        raise CrailError(f"{what} on {place} is wrong: {found}, expected {expected}")


@contextlib.contextmanager
def _peak_by_tier(config: ClientConfig | None) -> Iterator[dict[str, int]]:
    """The most bytes that each tier held at once while the block ran; filled as it runs."""
    peak_bytes: dict[str, int] = {}
    if config is None:
        yield peak_bytes
        return
    done = threading.Event()
    failures: list[BaseException] = []

    async def watch() -> None:
        async with connected(config.metadata, config) as metadata:
            while not done.is_set():
                status = await cluster_status(metadata, config)
                for tier in status.statistics.tiers:
                    used_blocks = tier.total_blocks - tier.free_blocks
                    used_bytes = used_blocks * status.cluster.block_size_bytes
                    name = tier.tier.name.lower()
                    peak_bytes[name] = max(peak_bytes.get(name, 0), used_bytes)
                await trio.sleep(_SAMPLE_INTERVAL_SECONDS)

    def run() -> None:
        try:
            trio.run(watch)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield peak_bytes
    finally:
        done.set()
        thread.join(_STEP_TIMEOUT_SECONDS)
    if failures:
        reason = error_of(failures[0]) or failures[0]
        raise CrailError(f"the tiers' use could not be asked for: {reason}") from failures[0]


def _tell_what_is_kept(bed: Workbench, options: argparse.Namespace) -> None:
    print(f"\nKept: the data in {bed.directory}/input")
    if options.on is None:
        print(f"and the file system at {bed.mountpoint}. To remove all of it:")
        state = bed.state.directory
        print(f"  crail down {bed.mountpoint} --state {state} --force --destroy")
    print(f"  rm -r {bed.directory} {bed.shared_memory}")


if __name__ == "__main__":
    sys.exit(main())
