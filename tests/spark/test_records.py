"""The TeraSort generator, and that the check of its output finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from crailfs.spark_jobs import records


def read(directory: Path) -> list[tuple[bytes, bytes]]:
    table = pyarrow.parquet.read_table(directory)
    return list(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))


def write(path: Path, rows: list[tuple[bytes, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    columns = {
        "key": pyarrow.array([key for key, _ in rows], pyarrow.binary()),
        "value": pyarrow.array([value for _, value in rows], pyarrow.binary()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_a_seed_gives_the_same_records_and_another_seed_others(tmp_path: Path) -> None:
    digest = records.generate(tmp_path / "a", 1000, seed=1)
    assert records.generate(tmp_path / "b", 1000, seed=1) == digest
    assert records.generate(tmp_path / "c", 1000, seed=2) != digest
    rows = read(tmp_path / "a")
    assert rows == read(tmp_path / "b")
    assert len(set(rows)) == 1000
    assert {(len(key), len(value)) for key, value in rows} == {(10, 90)}


def test_sorted_files_have_the_digest_of_what_was_made(tmp_path: Path) -> None:
    digest = records.generate(tmp_path / "input", 1000, seed=3)
    rows = sorted(read(tmp_path / "input"))
    write(tmp_path / "output" / "part-0.parquet", rows[:400])
    write(tmp_path / "output" / "part-1.parquet", [])
    write(tmp_path / "output" / "part-2.parquet", rows[400:])
    assert records.check_sorted(tmp_path / "output") == digest


def test_a_key_out_of_order_is_found_in_a_file_and_between_files(tmp_path: Path) -> None:
    records.generate(tmp_path / "input", 100, seed=4)
    rows = sorted(read(tmp_path / "input"))
    write(tmp_path / "swapped" / "part-0.parquet", [rows[1], rows[0], *rows[2:]])
    write(tmp_path / "parts" / "part-0.parquet", rows[50:])
    write(tmp_path / "parts" / "part-1.parquet", rows[:50])
    for name in ("swapped", "parts"):
        with pytest.raises(records.InvalidRecordsError, match="is not sorted"):
            records.check_sorted(tmp_path / name)


def test_keys_that_differ_in_their_last_byte_only_are_told_apart(tmp_path: Path) -> None:
    low, high = (b"same-key" + end for end in (b"\x00\x01", b"\x01\x00"))
    value = bytes(90)
    write(tmp_path / "good" / "part-0.parquet", [(low, value), (high, value)])
    write(tmp_path / "bad" / "part-0.parquet", [(high, value), (low, value)])
    assert records.check_sorted(tmp_path / "good").record_count == 2
    with pytest.raises(records.InvalidRecordsError):
        records.check_sorted(tmp_path / "bad")


def test_a_lost_a_doubled_and_a_mixed_record_change_the_digest(tmp_path: Path) -> None:
    digest = records.generate(tmp_path / "input", 100, seed=5)
    rows = sorted(read(tmp_path / "input"))
    mixed = [(rows[0][0], rows[1][1]), (rows[1][0], rows[0][1]), *rows[2:]]
    for number, wrong in enumerate((rows[1:], [*rows, rows[-1]], [rows[0], *rows[:-1]], mixed)):
        write(tmp_path / f"{number}" / "part-0.parquet", wrong)
        assert records.check_sorted(tmp_path / f"{number}") != digest


def test_a_record_of_another_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "output" / "part-0.parquet", [(bytes(10), bytes(89))])
    with pytest.raises(records.InvalidRecordsError, match="another size"):
        records.check_sorted(tmp_path / "output")


def test_random_bytes_use_the_whole_range() -> None:
    random = numpy.random.Generator(numpy.random.PCG64(6))
    assert len(numpy.unique(records._random_bytes(random, 1000, 10))) == 256
