"""``crail bench store`` and ``metadata`` on a file system of their own, with little work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from crailfs.bench import store
from crailfs.bench.workbench import Workbench
from crailfs.cli.main import main

pytestmark = [pytest.mark.mount, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    with Workbench("test") as bench:
        bench.start_crail("--memory", "128MiB", "--disk", "128MiB")
        yield bench


@pytest.fixture(autouse=True)
def of_this_bench(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAIL_STATE_HOME", bench.environment["CRAIL_STATE_HOME"])


def test_every_workload_by_each_transport(
    bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "store", "--at", str(bench.mountpoint), "--transports=local,tcp"]
    assert main([*command, "--rounds=1", "--scale=0.01", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["subjects"] == ["local", "tcp"]
    measured = {(each["workload"], each["subject"]): each["median"] for each in document["results"]}
    assert set(measured) == {(name, by) for name in store.UNITS for by in ("local", "tcp")}
    assert all(value > 0 for value in measured.values())
    assert os.listdir(bench.mountpoint) == []


def test_a_transport_that_does_not_exist_is_given_up(
    bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "store", "--at", str(bench.mountpoint), "--transports=pigeon,local"]
    assert main([*command, "--rounds=1", "--scale=0.01"]) != 0
    assert "pigeon" in capsys.readouterr().err


def test_what_many_files_cost(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "metadata", "--at", str(bench.mountpoint), "--files=1500", "--json"]) == 0

    figures = json.loads(capsys.readouterr().out)
    assert figures["file_count"] == 1500
    assert figures["lmdb_bytes"] > 0
    assert set(figures["processes"]) == {"metadata", "storage", "mount"}
    assert all(memory["own_bytes"] > 1 << 20 for memory in figures["processes"].values())
    made = [
        name for _, _, names in os.walk(bench.mountpoint / "crail-bench-files") for name in names
    ]
    assert len(made) == 1500
