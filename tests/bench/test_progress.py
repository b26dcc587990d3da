"""The progress display: nothing at first, then a bar on a terminal and lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest

from crailfs.bench.progress import Progress


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quick_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), Terminal()
    with Progress("copying", out=out) as progress:
        progress.show(0.1)
        clock.now += 1.9
        progress.show(0.9)
    assert out.getvalue() == ""


def test_a_line_every_few_seconds_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress("copying", out=out) as progress:
        for _ in range(20):
            clock.now += 1
            progress.show((clock.now - 100) / 40, "file 7")
    lines = out.getvalue().splitlines()
    assert lines[0] == "copying    5%  0:02 elapsed  0:38 to go  file 7"
    assert len(lines) == 4


def test_a_bar_on_a_terminal_that_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), Terminal()
    with Progress("copying", out=out) as progress:
        clock.now += 60
        progress.show(0.5)
        shown = out.getvalue()
    assert "[##############..............]" in shown
    assert "1:00 elapsed  1:00 to go" in shown
    assert "\n" not in out.getvalue()
    assert out.getvalue().endswith(" \r")
