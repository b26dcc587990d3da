"""Refused clients and life lines, with real processes holding them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crailfs.errors import FencedError
from storage_server.fencing import Fencing


def hold_in_child(fd: int) -> subprocess.Popen[bytes]:
    """A process that has ``fd`` open and does nothing until it is ended."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(fd,),
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_a_client_without_life_line_is_gone(tmp_path: Path) -> None:
    assert not Fencing(tmp_path).has_life_line(7)


def test_a_life_line_lasts_until_its_last_descriptor_is_closed(tmp_path: Path) -> None:
    fencing = Fencing(tmp_path)
    fd = fencing.new_life_line(7)
    copy = os.dup(fd)
    os.close(fd)
    assert fencing.has_life_line(7)
    assert not fencing.has_life_line(8)
    os.close(copy)
    assert not fencing.has_life_line(7)
    assert list((tmp_path / "clients").iterdir()) == []


def test_a_client_that_attached_twice_is_gone_only_when_both_are(tmp_path: Path) -> None:
    fencing = Fencing(tmp_path)
    first, second = fencing.new_life_line(7), fencing.new_life_line(7)
    os.close(first)
    assert fencing.has_life_line(7)
    os.close(second)
    assert not fencing.has_life_line(7)


@pytest.mark.timeout(20)
def test_a_stopped_process_keeps_its_life_line_until_it_is_killed(tmp_path: Path) -> None:
    fd = Fencing(tmp_path).new_life_line(7)
    child = hold_in_child(fd)
    os.close(fd)
    try:
        child.send_signal(signal.SIGSTOP)
        restarted = Fencing(tmp_path)
        assert restarted.has_life_line(7)
        restarted.sweep()
        assert restarted.has_life_line(7)
    finally:
        child.kill()
        child.communicate()
    assert not Fencing(tmp_path).has_life_line(7)


def test_sweep_removes_what_nobody_holds(tmp_path: Path) -> None:
    fencing = Fencing(tmp_path)
    held, dropped = fencing.new_life_line(1), fencing.new_life_line(2)
    os.close(dropped)
    fencing.sweep()
    assert [path.name[:16] for path in (tmp_path / "clients").iterdir()] == [f"{1:016x}"]
    os.close(held)


def test_a_refused_client_stays_refused_after_a_restart(tmp_path: Path) -> None:
    fencing = Fencing(tmp_path)
    fencing.check(7)
    fencing.refuse([7, (1 << 64) - 1])
    fencing.refuse([7])
    for one in (fencing, Fencing(tmp_path)):
        for client_id in (7, (1 << 64) - 1):
            with pytest.raises(FencedError, match="lost its session"):
                one.check(client_id)
        one.check(8)
    assert (tmp_path / "fenced").stat().st_size == 16


def test_a_torn_entry_of_refused_clients_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Fencing(tmp_path).refuse([7])
    with (tmp_path / "fenced").open("ab") as file:
        file.write(b"torn")
    again = Fencing(tmp_path)
    assert "unfinished" in caplog.text
    again.refuse([9])
    for client_id in (7, 9):
        with pytest.raises(FencedError):
            Fencing(tmp_path).check(client_id)
