"""How long a waiter looks, on a clock that only moves when it is told to."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from crailfs.net import waiting
from crailfs.net.waiting import (
    LONG_YIELD_S,
    SKIPPED_WHEN_CONTENDED_MAX,
    SKIPPED_WHEN_LATE,
    SPIN_S,
    Spinner,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.yield_s = SPIN_S / 10
        self.yields = 0

    def sched_yield(self) -> None:
        self.yields += 1
        self.now_s += self.yield_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting.os, "sched_yield", clock.sched_yield)
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: clock.now_s)
    return clock


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


Pair = tuple[socket.socket, socket.socket]


def test_what_is_ready_is_seen_at_once(pair: Pair, clock: Clock) -> None:
    spinner = Spinner(pair[0].fileno())
    pair[1].send(b"x")
    assert spinner.wait()
    assert clock.yields == 0


def test_the_end_of_a_connection_is_seen(pair: Pair, clock: Clock) -> None:
    spinner = Spinner(pair[0].fileno())
    pair[1].close()
    assert spinner.wait()


def test_a_late_peer_is_not_looked_for_the_next_times(pair: Pair, clock: Clock) -> None:
    spinner = Spinner(pair[0].fileno())
    assert not spinner.wait()
    assert SPIN_S <= clock.now_s <= 1.5 * SPIN_S
    looked = clock.yields
    pair[1].send(b"x")
    assert [spinner.wait() for _ in range(SKIPPED_WHEN_LATE)] == [False] * SKIPPED_WHEN_LATE
    assert clock.yields == looked
    assert spinner.wait()


def looks_skipped(spinner: Spinner, clock: Clock) -> int:
    """Waits until the next one that looks."""
    skipped, looked = 0, clock.yields
    while not spinner.wait() and clock.yields == looked:
        skipped += 1
    return skipped


def test_where_others_want_the_processor_it_is_left_to_them(pair: Pair, clock: Clock) -> None:
    spinner = Spinner(pair[0].fileno())
    clock.yield_s = 2 * LONG_YIELD_S
    assert not spinner.wait()
    assert clock.yields == 1, "no second yield after a long one"
    skipped = [looks_skipped(spinner, clock) for _ in range(5)]
    most = SKIPPED_WHEN_CONTENDED_MAX
    assert skipped == [min(SKIPPED_WHEN_LATE * 4**n, most) for n in range(5)]


def test_a_peer_that_used_the_long_yield_is_seen(
    pair: Pair, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    spinner = Spinner(pair[0].fileno())

    def sched_yield() -> None:
        clock.now_s += 2 * LONG_YIELD_S
        pair[1].send(b"x")

    monkeypatch.setattr(waiting.os, "sched_yield", sched_yield)
    assert spinner.wait()


def test_quiet_times_bring_the_looking_back(pair: Pair, clock: Clock) -> None:
    spinner = Spinner(pair[0].fileno())
    clock.yield_s = 2 * LONG_YIELD_S
    for _ in range(4):
        looks_skipped(spinner, clock)
    pair[1].send(b"x")
    while not spinner.wait():
        pass
    for _ in range(SKIPPED_WHEN_CONTENDED_MAX):
        assert spinner.wait()
    pair[0].recv(1)
    assert not spinner.wait()
    assert looks_skipped(spinner, clock) == SKIPPED_WHEN_LATE
