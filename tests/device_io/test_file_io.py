"""Reads, writes and the choice between event loop and thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.device_io import file_io
from crailfs.units import MIB


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_a_read_past_the_end_is_an_error_not_a_short_answer(fd: int) -> None:
    file_io.write_all(fd, memoryview(b"0123456789"), 0)
    buffer = bytearray(5)
    assert file_io.read_exactly(fd, memoryview(buffer), 5, wait=True)
    assert buffer == b"56789"
    with pytest.raises(OSError, match="ends early"):
        file_io.read_exactly(fd, memoryview(buffer), 6, wait=True)


def test_short_transfers_are_continued(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at, flags: preadv(fd, [into[0][:2]], at))
    file_io.write_all(fd, memoryview(b"0123456789"), 7)
    buffer = bytearray(10)
    assert file_io.read_exactly(fd, memoryview(buffer), 7, wait=False)
    assert buffer == b"0123456789"


@pytest.mark.parametrize("problem", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_only_a_read_that_may_not_wait_reports_that_it_would(
    fd: int, monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    def preadv(*_: object) -> int:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(os, "preadv", preadv)
    assert not file_io.read_exactly(fd, memoryview(bytearray(1)), 0, wait=False)
    with pytest.raises(OSError, match=os.strerror(problem)):
        file_io.read_exactly(fd, memoryview(bytearray(1)), 0, wait=True)


def test_after_a_slow_write_threads_are_used_for_a_while(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    write_s = 0.005

    def write_all(*_: object) -> None:
        nonlocal now_s
        now_s += write_s

    monkeypatch.setattr(file_io.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(file_io, "write_all", write_all)
    writes = file_io.InlineWrites()
    assert writes.allowed(MIB) and not writes.allowed(MIB + 1)
    writes.write_all(fd, memoryview(b"x"), 0)
    assert writes.allowed(1)
    write_s = 0.02
    writes.write_all(fd, memoryview(b"x"), 0)
    assert not writes.allowed(1)
    now_s += 0.2
    assert not writes.allowed(1)
    now_s += 0.1
    assert writes.allowed(1)
