"""``crail bench mount`` on temporary directories, with tiny amounts of work."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.bench import mount, workloads
from crailfs.bench.report import Report, Row
from crailfs.bench.workers import Phase, WorkerFailedError, run_session
from crailfs.cli.main import main
from crailfs.units import MIB

TINY = workloads.Sizes(
    stream_bytes=2 * MIB,
    random_reads=64,
    small_files=16,
    stat_rounds=2,
    listed_entries=100,
    listings=2,
)


def test_every_workload_is_measured_on_every_directory_and_nothing_is_left(tmp_path: Path) -> None:
    subjects = [mount.Subject(name, tmp_path / name) for name in ("a", "b")]
    for subject in subjects:
        subject.directory.mkdir()
    report = mount.measure(subjects, round_count=3, process_counts=(1, 2), sizes=TINY)

    assert report.failures == {}
    measured = {(row.workload, row.variant) for row in report.samples}
    assert measured == {(each.name, n) for each in workloads.WORKLOADS for n in ("1", "2")}
    for by_subject in report.samples.values():
        assert {name: len(values) for name, values in by_subject.items()} == {"a": 3, "b": 3}
        assert all(value > 0 for values in by_subject.values() for value in values)
    for subject in subjects:
        assert list(subject.directory.iterdir()) == []


def test_the_command_prints_json_and_writes_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "place").mkdir()
    arguments = ["bench", "mount", f"here={tmp_path / 'place'}", "--rounds=1", "--processes=1"]
    plot = tmp_path / "plot.png"
    assert main([*arguments, "--scale=0.001", "--json", f"--plot={plot}"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["subjects"] == ["here"]
    units = {result["workload"]: result["unit"] for result in document["results"]}
    assert units == dict(workloads.UNITS)
    assert all(result["median"] > 0 for result in document["results"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_ratios_are_against_the_reference() -> None:
    report = Report("title", ["a", "b"], {"stat": "us"}, "processes", "b")
    for value in (1.0, 2.0, 90.0):
        report.add(Row("stat", "1"), "a", value)
        report.add(Row("stat", "1"), "b", 4.0)
    assert report.ratio(Row("stat", "1"), "a", "b") == 0.5
    assert "x0.50" in report.table()


def test_a_directory_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good").mkdir()
    command = ["bench", "mount", str(tmp_path / "good"), str(tmp_path / "missing")]
    assert main([*command, "--rounds=1", "--processes=1", "--scale=0.001"]) == 1

    output = capsys.readouterr()
    assert "missing was given up: preparation: FileNotFoundError" in output.err
    line = next(line for line in output.out.splitlines() if line.startswith("unlink"))
    assert line.split()[-1] == "-"
    assert float(line.split()[-2]) > 0


@pytest.mark.timeout(30)
def test_a_worker_that_hangs_is_reported_at_the_time_limit() -> None:
    def session(index: int) -> Iterator[Phase]:
        yield Phase("hang", lambda: signal.sigwait({signal.SIGUSR1}) and 0)

    began = time.monotonic()
    with pytest.raises(WorkerFailedError, match="hang: no answer within 1 s"):
        run_session(session, 2, phase_timeout_seconds=1)
    assert time.monotonic() - began < 10


def test_a_worker_that_dies_is_reported() -> None:
    def die() -> int:
        signal.raise_signal(signal.SIGKILL)
        return 0

    def session(index: int) -> Iterator[Phase]:
        yield Phase("die", die)

    with pytest.raises(WorkerFailedError, match="die: a worker process died"):
        run_session(session, 1, phase_timeout_seconds=20)


def test_labels_must_tell_directories_apart(tmp_path: Path) -> None:
    assert main(["bench", "mount", str(tmp_path), str(tmp_path)]) == 2
