"""The journal: what it keeps, what it cuts off, what it refuses."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from crailfs.errors import DamagedError
from metadata_server import journal as journal_module
from metadata_server.journal import HEADER_BYTES, RECORD_OVERHEAD_BYTES, Journal

CLUSTER = b"c" * 16
OTHER_BOOT = b"b" * 16


def _rows(number: int) -> list[tuple[int, bytes, bytes | None]]:
    return [(1, b"key%d" % number, b"value" * number), (2, b"gone", None)]


def _write(path: Path, count: int, *, sync_after: int = 0, first: int = 1) -> list[int]:
    """A journal of ``count`` records; returns where each begins."""
    offsets = []
    with closing(Journal.create(path, CLUSTER, first - 1)) as journal:
        for number in range(first, first + count):
            offsets.append(HEADER_BYTES + journal.size_bytes)
            journal.append(_rows(number))
            if number == sync_after:
                journal.sync()
    return offsets


def _read(path: Path, after: int = 0) -> list[int]:
    with closing(Journal.open(path, CLUSTER)) as journal:
        records = list(journal.replay(after))
        assert [list(record.rows) for record in records] == [_rows(r.sequence) for r in records]
        return [record.sequence for record in records]


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _write(path, 5)
    assert _read(path) == [1, 2, 3, 4, 5]
    assert _read(path, after=3) == [4, 5]
    assert _read(path, after=5) == _read(path, after=9) == []


def test_appending_goes_on_after_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _write(path, 2)
    with closing(Journal.open(path, CLUSTER)) as journal:
        list(journal.replay(0))
        journal.append(_rows(3))
    assert _read(path) == [1, 2, 3]


def test_reset_forgets_and_the_sequence_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with closing(Journal.create(path, CLUSTER, 0)) as journal:
        journal.append(_rows(1))
        journal.reset()
        assert journal.size_bytes == 0
        journal.append(_rows(2))
    assert _read(path, after=1) == [2]
    with pytest.raises(DamagedError, match="that it had committed"):
        _read(path, after=0)


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 3)
    whole = path.read_bytes()
    for end in range(offsets[2], len(whole)):
        path.write_bytes(whole[:end])
        assert _read(path) == [1, 2]
        assert path.stat().st_size == offsets[2]


def test_a_bad_last_record_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 3)
    for offset in range(offsets[2], path.stat().st_size):
        _write(path, 3)
        _flip(path, offset)
        assert _read(path) == [1, 2]


def test_every_flipped_byte_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 3)
    assert offsets[2] - offsets[1] > RECORD_OVERHEAD_BYTES
    for offset in range(offsets[0], offsets[2]):
        _write(path, 3)
        _flip(path, offset)
        before = path.read_bytes()
        with pytest.raises(DamagedError, match="Restore"):
            _read(path)
        assert path.read_bytes() == before


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: offsets[1]] + whole[offsets[2] :])
    with pytest.raises(DamagedError, match="missing"):
        _read(path)


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_a_bad_header_is_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "journal"
    _write(path, 1)
    _flip(path, offset)
    with pytest.raises(DamagedError):
        _read(path)


def test_a_journal_of_another_cluster_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    _write(path, 1)
    with pytest.raises(DamagedError, match="belongs to cluster"):
        Journal.open(path, b"x" * 16)


def test_a_power_cut_may_lose_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 6, sync_after=2)
    monkeypatch.setattr(journal_module, "current_boot_id", lambda: OTHER_BOOT)
    _flip(path, offsets[3] + RECORD_OVERHEAD_BYTES)
    assert _read(path) == [1, 2, 3]


def test_a_power_cut_is_no_excuse_for_what_was_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    offsets = _write(path, 6, sync_after=3)
    monkeypatch.setattr(journal_module, "current_boot_id", lambda: OTHER_BOOT)
    _flip(path, offsets[2] + RECORD_OVERHEAD_BYTES)
    with pytest.raises(DamagedError):
        _read(path)


def test_a_write_that_fails_half_way_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    write = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) < 50:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[: len(data) // 2], offset)

    with closing(Journal.create(path, CLUSTER, 0)) as journal:
        journal.append(_rows(1))
        size_bytes = path.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="space"):
                journal.append(_rows(50))
        assert path.stat().st_size == size_bytes
        journal.append(_rows(2))
    assert _read(path) == [1, 2]
