"""``crail bench pmem`` and ``nvme`` with little work: everything is measured, nothing stays."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from crailfs.bench import fio, nvme, pmem
from crailfs.cli.main import main
from crailfs.pmem import libpmemobj

pytestmark = pytest.mark.timeout(120)

LITTLE = ("--rounds=1", "--scale=0.02")


def left_behind() -> list[str]:
    places = (Path("/var/tmp"), Path("/dev/shm"))
    return [name for place in places for name in os.listdir(place) if "crail-bench-" in name]


def medians(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(each["workload"], each["subject"]): each["median"] for each in document["results"]}


@pytest.mark.skipif(libpmemobj.missing() is not None, reason="libpmemobj is not installed")
def test_persistent_memory_beside_memory(capsys: pytest.CaptureFixture[str]) -> None:
    before = left_behind()
    assert main(["bench", "pmem", *LITTLE, "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    measured = medians(document)
    assert set(measured) == {(name, by) for name in pmem.UNITS for by in ("memory", "pmem")}
    assert all(value > 0 for value in measured.values())
    assert document["reference"] == "memory"
    assert any("not durable" in note for note in document["notes"])
    assert left_behind() == before


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_the_nvme_tier_beside_fio(capsys: pytest.CaptureFixture[str]) -> None:
    before = left_behind()
    assert main(["bench", "nvme", *LITTLE, "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    measured = medians(document)
    subjects = ("fio", "medium", "client")
    assert set(measured) == {(name, by) for name in nvme.UNITS for by in subjects}
    assert all(value > 0 for value in measured.values())
    assert left_behind() == before


def test_without_fio_its_column_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fio.missing() is not None
    assert main(["bench", "nvme", *LITTLE]) == 0

    said = capsys.readouterr().out
    assert "fio is not installed" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("random read 4 KiB")]
    assert rows[0][6] == "-"
    assert float(rows[0][7].replace(",", "")) > 0


def test_a_directory_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nvme", "--directory", "/nowhere"]) == 2
    assert "/nowhere: there is no such directory" in capsys.readouterr().err
