"""``crail bench mount``: one list of workloads on several directories, interleaved."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from crailfs.bench import workloads
from crailfs.bench.progress import Progress
from crailfs.bench.report import Report, Row
from crailfs.bench.workers import Phase, Session, WorkerFailedError, run_session
from crailfs.errors import ConfigurationError

PHASE_TIMEOUT_SECONDS: Final = 120.0
_CLEAN_TIMEOUT_SECONDS: Final = 30.0
_DROPPED_WELL: Final = 0.02
"""A file that keeps no more than this part of its pages in the cache counts as dropped."""


class Subject(NamedTuple):
    """A directory to measure, and what the table calls it."""

    label: str
    directory: Path

    @classmethod
    def parse(cls, text: str) -> Subject:
        """``DIR`` or ``LABEL=DIR``."""
        label, separator, directory = text.partition("=")
        if not separator or "/" in label:
            label, directory = Path(text).name or text, text
        return cls(label, Path(directory).absolute())


def measure(
    subjects: Sequence[Subject],
    *,
    round_count: int = 3,
    process_counts: Sequence[int] = (1, 4),
    sizes: workloads.Sizes | None = None,
    reference: str = "",
    phase_timeout_seconds: float = PHASE_TIMEOUT_SECONDS,
) -> Report:
    """Run every workload on every directory, one directory after the other within each round, so
    that whatever else the machine does hits all of them alike.

    A directory that fails or does not answer in time is given up and named in the report; the
    others go on. Everything is made in a directory of its own in each of them, which is removed.

    Raises:
        ConfigurationError: two subjects share a label, or ``reference`` is none of them.
    """
    labels = [subject.label for subject in subjects]
    if len(set(labels)) != len(labels):
        raise ConfigurationError(
            f"two directories are both called {max(labels, key=labels.count)!r}: "
            "name them with LABEL=DIR"
        )
    reference = reference or labels[0]
    if reference not in labels:
        raise ConfigurationError(f"there is no directory {reference!r} to compare with: {labels}")
    report = Report("Mounts and directories", labels, workloads.UNITS, "processes", reference)
    chosen = sizes or workloads.Sizes()
    plan = [
        (count, session, subject)
        for _ in range(round_count)
        for count in process_counts
        for session in workloads.SESSIONS
        for subject in subjects
    ]
    run = _Run(report, phase_timeout_seconds)
    places = {
        subject.label: subject.directory / f"crail-bench-{os.getpid()}" for subject in subjects
    }
    with Progress("measuring") as progress:
        try:
            for subject in subjects:
                run.prepare(subject.label, places[subject.label], chosen, progress)
            for number, (count, session, subject) in enumerate(plan):
                bound = functools.partial(session, places[subject.label], chosen, count)
                run.one(subject.label, bound, count, progress, number / len(plan))
        finally:
            for label, place in places.items():
                run.clean(label, place, progress)
    return report


class _Run:
    def __init__(self, report: Report, phase_timeout_seconds: float) -> None:
        self._report = report
        self._timeout_seconds = phase_timeout_seconds

    def one(
        self, label: str, session: Session, count: int, progress: Progress, fraction: float
    ) -> None:
        if label in self._report.failures:
            return
        try:
            timings = run_session(
                session,
                count,
                phase_timeout_seconds=self._timeout_seconds,
                on_wait=lambda doing: progress.show(fraction, f"{label}: {doing}"),
            )
        except WorkerFailedError as error:
            self._report.failures[label] = str(error)
            return
        for timing in timings:
            per_second = timing.amount / timing.seconds
            in_us = self._report.units[timing.workload] == "us"
            value = 1e6 / per_second if in_us else per_second / 1e6
            self._report.add(Row(timing.workload, str(count)), label, value)

    def prepare(self, label: str, place: Path, sizes: workloads.Sizes, progress: Progress) -> None:
        def make(_: int) -> Iterator[Phase]:
            place.mkdir()
            workloads.make_tree(place, sizes)
            yield Phase("prepare", lambda: round(1000 * workloads.cache_after_drop(place)))

        try:
            kept = self._alone(label, make, progress, self._timeout_seconds) / 1000
        except WorkerFailedError as error:
            self._report.failures[label] = str(error)
            return
        if kept > _DROPPED_WELL:
            self._report.notes.append(
                f"{label} keeps {kept:.0%} of a file in the page cache when asked to drop it: "
                "its cold reads are warm."
            )

    def clean(self, label: str, place: Path, progress: Progress) -> None:
        def remove(_: int) -> Iterator[Phase]:
            yield Phase("clean up", remove_tree)

        def remove_tree() -> int:
            if place.exists():
                shutil.rmtree(place)
            return 0

        try:
            self._alone(label, remove, progress, _CLEAN_TIMEOUT_SECONDS)
        except WorkerFailedError as error:
            self._report.failures.setdefault(label, f"{error} ({place} is left)")

    def _alone(
        self, label: str, session: Session, progress: Progress, timeout_seconds: float
    ) -> int:
        """One worker outside the measurement; what its only phase returned."""
        timings = run_session(
            session,
            1,
            phase_timeout_seconds=timeout_seconds,
            on_wait=lambda doing: progress.show(None, f"{label}: {doing}"),
        )
        return timings[0].amount
