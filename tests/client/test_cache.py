"""Leases, and replies that a change has overtaken."""

from __future__ import annotations

import pytest

from crailfs.client import cache as cache_module
from crailfs.client.cache import ABSENT, Entry, NodeCache
from crailfs.records import Attributes, NodeKind, Placement

DIRECTORY, FILE = 10, 11


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cache_module, "lease_clock", lambda: clock.now)
    return clock


def attributes(
    ino: int, *, size: int = 0, version: int = 1, kind: NodeKind = NodeKind.FILE
) -> Attributes:
    return Attributes(
        ino=ino, kind=kind, mode=0o644, uid=0, gid=0, nlink=1, size=size, block_count=0,
        atime_ns=0, mtime_ns=0, ctime_ns=0, btime_ns=0, rdev=0, parent=0, data_version=version,
        placement=Placement(),
    )  # fmt: skip


def directory(**changes: int) -> Attributes:
    return attributes(DIRECTORY, kind=NodeKind.DIRECTORY, **changes)


def test_a_lease_runs_from_sending(clock: Clock) -> None:
    cache = NodeCache(5000)
    ticket = cache.ticket()
    clock.now += 4.0  # the reply took that long
    cache.store(attributes(FILE), ticket)
    assert cache.attributes(FILE) is not None
    assert cache.lease_remaining_ms(FILE) == 1000
    clock.now += 1.0
    assert cache.attributes(FILE) is None
    assert cache.lease_remaining_ms(FILE) == 0


def test_renewal_that_comes_after_the_lease_ran_out_revives_nothing(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store(attributes(FILE), cache.ticket())
    clock.now += 4.0
    ticket = cache.ticket()
    nodes = cache.to_renew([FILE])
    clock.now += 2.0
    cache.renewed(nodes, ticket)
    assert cache.attributes(FILE) is None


def test_renewal_in_time(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store(attributes(FILE), cache.ticket())
    clock.now += 4.0
    ticket = cache.ticket()
    cache.renewed(cache.to_renew([FILE]), ticket)
    clock.now += 4.0
    assert cache.attributes(FILE) is not None


def test_a_broken_connection_ends_all_leases(clock: Clock) -> None:
    cache = NodeCache(5000)
    late = cache.ticket()
    cache.store(attributes(FILE), cache.ticket())
    cache.disconnect()
    assert cache.attributes(FILE) is None
    cache.store(attributes(FILE), late)
    assert cache.attributes(FILE) is None, "that reply is of the connection before"
    cache.store(attributes(FILE), cache.ticket())
    assert cache.attributes(FILE) is not None


def test_invalidation_overtakes_a_reply(clock: Clock) -> None:
    cache = NodeCache(5000)
    ticket = cache.ticket()
    cache.invalidate(FILE)
    assert cache.store(attributes(FILE), ticket) is None
    assert cache.attributes(FILE) is None


def test_own_change_overtakes_an_older_reply(clock: Clock) -> None:
    cache = NodeCache(5000)
    reading, writing = cache.ticket(), cache.ticket()
    cache.store(attributes(FILE, size=5), writing, changed=True)
    cache.store(attributes(FILE, size=0), reading)
    known = cache.attributes(FILE)
    assert known is not None and known.size == 5


def test_two_changes_at_once_leave_nothing_to_trust(clock: Clock) -> None:
    cache = NodeCache(5000)
    first, second = cache.ticket(), cache.ticket()
    cache.store(attributes(FILE, size=5), first, changed=True)
    cache.store(attributes(FILE, size=3), second, changed=True)
    assert cache.attributes(FILE) is None


def test_a_map_lives_as_long_as_its_data_version(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store_new(attributes(FILE, version=7), cache.ticket(), 4096)
    node = cache.node(FILE)
    assert node is not None and cache.blocks(node) is not None
    clock.now += 10.0
    cache.store(attributes(FILE, version=7), cache.ticket())
    assert cache.blocks(node) is not None, "the same version: the same blocks"
    cache.store(attributes(FILE, version=8), cache.ticket())
    assert cache.blocks(node) is None


def test_missing_names_are_remembered_until_told_otherwise(clock: Clock) -> None:
    cache = NodeCache(5000)
    assert cache.entry(DIRECTORY, b"x") is None
    cache.store_entry(DIRECTORY, b"x", ABSENT, cache.ticket())
    assert cache.entry(DIRECTORY, b"x") is ABSENT
    assert cache.entry(DIRECTORY, b"y") is None
    cache.invalidate(DIRECTORY, b"x")
    assert cache.entry(DIRECTORY, b"x") is None


def test_names_do_not_survive_a_gap_in_the_lease(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store_entry(DIRECTORY, b"x", Entry(FILE), cache.ticket())
    clock.now += 6.0
    cache.store_entry(DIRECTORY, b"y", ABSENT, cache.ticket())
    assert cache.entry(DIRECTORY, b"x") is None, "it may have changed in between"
    assert cache.entry(DIRECTORY, b"y") is ABSENT


def test_a_new_directory_is_known_wholly(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store_new(directory(), cache.ticket(), 4096)
    assert cache.entry(DIRECTORY, b"anything") is ABSENT
    cache.change_entries(DIRECTORY, {b"mine": Entry(FILE)}, cache.ticket(), None)
    assert cache.entry(DIRECTORY, b"mine") == Entry(FILE)
    assert cache.entry(DIRECTORY, b"other") is ABSENT
    cache.invalidate(DIRECTORY, b"theirs")
    assert cache.entry(DIRECTORY, b"theirs") is None
    assert cache.entry(DIRECTORY, b"mine") == Entry(FILE)


def test_directory_attributes_are_carried_over_only_when_certain(clock: Clock) -> None:
    cache = NodeCache(5000)
    cache.store(directory(size=3), cache.ticket())
    ticket = cache.ticket()
    after = cache.directory_after(DIRECTORY, ticket, entries=1, subdirectories=0, time_ns=9)
    assert after is not None and (after.size, after.mtime_ns) == (4, 9)
    cache.store(directory(size=4), cache.ticket())
    assert (
        cache.directory_after(DIRECTORY, ticket, entries=1, subdirectories=0, time_ns=9) is None
    ), "these attributes may already count the new entry"


def test_bounded_with_the_least_recently_used_going_first(clock: Clock) -> None:
    cache = NodeCache(5000, nodes_max=10)
    pinned = cache.pin(1)
    cache.store(attributes(1), cache.ticket())
    for ino in range(2, 30):
        cache.store(attributes(ino), cache.ticket())
        cache.attributes(2)
    assert cache.attributes(1) is not None, "open files stay"
    assert cache.attributes(2) is not None, "just used"
    assert cache.attributes(3) is None
    assert cache.attributes(29) is not None
    cache.unpin(pinned)
    for number in range(100):
        cache.store_entry(DIRECTORY, b"%d" % number, ABSENT, cache.ticket())
    known = [n for n in range(100) if cache.entry(DIRECTORY, b"%d" % n) is not None]
    assert len(known) <= 10
