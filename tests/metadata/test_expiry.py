"""Time to live: what goes, when, and what stays. Time is the test's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crailfs.errors import NotFoundError, StaleError
from crailfs.records import Attributes, NodeKind
from crailfs.units import NANOSECONDS_PER_SECOND, ROOT_INODE
from crailfs.wire.messages import (
    CreateNode,
    GetAttributes,
    GetExtents,
    LinkNode,
    Lookup,
    Opcode,
    RemoveXattr,
    SetAttributes,
    SetXattr,
)
from metadata_server import expiry
from metadata_server.driver import Driver
from metadata_server.handler import MetadataHandler
from tests.metadata.handling import TIMINGS, Server
from tests.metadata.name_space import config

HOUR_S = 3_600
LEAVING_S = 12.0
"""After which a silent client has no session, and so no lease, any more."""
START_NS = 1_700_000_000 * NANOSECONDS_PER_SECOND


class TimedServer(Server):
    """The time of files passes as that of connections does."""

    def start(self) -> None:
        self.driver = Driver.open(config(self.state), clock_ns=self.now_ns)
        self.handler = MetadataHandler(self.driver, TIMINGS, lambda: self.now_s)

    def now_ns(self) -> int:
        return START_NS + int(self.now_s * NANOSECONDS_PER_SECOND)

    def leap(self, seconds: float) -> None:
        """Nothing happens meanwhile, clients are forgotten; then the server does what is due."""
        gone_s = min(seconds, LEAVING_S)
        self.pass_time(gone_s)
        self.now_s += seconds - gone_s
        self.handler.tick()
        self.expire()

    def expire(self) -> int:
        """All that is due now; returns in how many steps."""
        for steps in range(1, 10_000):
            if not self.handler.expire_nodes():
                return steps
        raise AssertionError("it never comes to an end")


class Scratch:
    """A client at work in /scratch, whose time to live is an hour."""

    def __init__(self, server: TimedServer) -> None:
        self.server = server
        self.client = server.connect(1)
        self.directory = self.mkdir(b"scratch", ROOT_INODE)
        self.set(self.directory, b"1h")

    def set(self, ino: int, value: bytes) -> None:
        self.server.ask(self.client, Opcode.SET_XATTR, SetXattr(ino, b"user.crail.ttl", value))

    def mkdir(self, name: bytes, parent: int | None = None) -> int:
        return self._create(name, parent, NodeKind.DIRECTORY)

    def file(self, name: bytes, parent: int | None = None) -> int:
        return self._create(name, parent, NodeKind.FILE)

    def _create(self, name: bytes, parent: int | None, kind: NodeKind) -> int:
        where = self.directory if parent is None else parent
        request = CreateNode(where, name, kind, 0o755, 0, 0)
        ino: int = self.server.ask(self.client, Opcode.CREATE_NODE, request).attributes.ino
        return ino

    def names(self, *names: bytes, parent: int | None = None) -> list[bytes]:
        """Those of ``names`` that are there."""
        found = []
        for name in names:
            request = Lookup(self.directory if parent is None else parent, name)
            reply = self.server.driver.execute(0, 0, Opcode.LOOKUP, request).reply
            if isinstance(reply, Attributes):
                found.append(name)
            else:
                assert isinstance(reply, NotFoundError)
        return found

    def stay(self, seconds: float, *opened: int) -> None:
        """The client lives on, with these files open, for so long."""
        while seconds > 0:
            self.server.pass_time(min(seconds, 1.0))
            self.server.keep_alive(self.client, *opened)
            self.server.expire()
            seconds -= 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TimedServer]:
    server = TimedServer(tmp_path / "state")
    yield server
    assert server.driver.audit().findings == ()
    server.driver.close()


@pytest.fixture
def scratch(server: TimedServer) -> Scratch:
    return Scratch(server)


def test_what_nobody_used_for_its_time_goes(server: TimedServer, scratch: Scratch) -> None:
    scratch.file(b"first")
    server.leap(HOUR_S / 2)
    scratch.client = server.connect(2)
    scratch.file(b"second")
    server.leap(HOUR_S / 2 - 1)
    assert scratch.names(b"first", b"second") == [b"first", b"second"]
    server.leap(2)
    assert scratch.names(b"first", b"second") == [b"second"]
    server.leap(HOUR_S / 2)
    assert scratch.names(b"first", b"second") == []
    assert server.handler.counters()["nodes_expired"] == 2


def test_what_is_below_goes_first_and_the_directory_itself_stays(
    server: TimedServer, scratch: Scratch
) -> None:
    inner = scratch.mkdir(b"inner")
    deep = scratch.mkdir(b"deep", inner)
    scratch.file(b"file", deep)
    for _ in range(4):
        server.leap(HOUR_S + 1)
    assert scratch.names(b"inner") == []
    assert server.driver.audit().counts["directory_nodes"] == 2
    for _ in range(3):
        server.leap(HOUR_S)
    assert scratch.names(b"scratch", parent=ROOT_INODE) == [b"scratch"]


@pytest.mark.parametrize("change", ["attributes", "content"])
def test_a_change_is_a_use(server: TimedServer, scratch: Scratch, change: str) -> None:
    file = scratch.file(b"file")
    server.leap(HOUR_S - 1)
    client = scratch.client = server.connect(2)
    if change == "attributes":
        server.ask(client, Opcode.SET_ATTRIBUTES, SetAttributes(file, mode=0o600))
    else:
        server.ask(client, Opcode.SET_ATTRIBUTES, SetAttributes(file, size=5))
    server.leap(HOUR_S - 1)
    assert scratch.names(b"file") == [b"file"]
    server.leap(2)
    assert scratch.names(b"file") == []


def test_an_old_time_stamp_does_not_make_a_new_file_old(
    server: TimedServer, scratch: Scratch
) -> None:
    """An archive that is unpacked sets the times that its files had."""
    file = scratch.file(b"file")
    request = SetAttributes(file, atime_ns=0, mtime_ns=0)
    server.ask(scratch.client, Opcode.SET_ATTRIBUTES, request)
    server.leap(HOUR_S - 1)
    assert scratch.names(b"file") == [b"file"]
    server.leap(2)
    assert scratch.names(b"file") == []


def test_a_read_is_a_use_also_after_a_restart(server: TimedServer, scratch: Scratch) -> None:
    file = scratch.file(b"file")
    server.leap(HOUR_S / 2)
    client = scratch.client = server.connect(2)
    server.ask(client, Opcode.GET_EXTENTS, GetExtents(file, 0, 1))
    server.driver.close()
    server.start()
    server.leap(HOUR_S - 1)
    assert scratch.names(b"file") == [b"file"]
    server.leap(HOUR_S / 8 + 2)
    assert scratch.names(b"file") == []


def test_looking_is_no_use(server: TimedServer, scratch: Scratch) -> None:
    file = scratch.file(b"file")
    server.leap(HOUR_S - 1)
    client = server.connect(2)
    server.ask(client, Opcode.LOOKUP, Lookup(scratch.directory, b"file"))
    server.ask(client, Opcode.GET_ATTRIBUTES, GetAttributes(file))
    server.leap(2)
    assert scratch.names(b"file") == []


def test_what_a_client_has_open_stays(server: TimedServer, scratch: Scratch) -> None:
    scratch.set(scratch.directory, b"20")
    file = scratch.file(b"file")
    other = scratch.file(b"other")
    scratch.stay(50, file)
    assert scratch.names(b"file", b"other") == [b"file"]
    with pytest.raises(StaleError):
        server.ask(scratch.client, Opcode.GET_ATTRIBUTES, GetAttributes(other))
    scratch.stay(30)
    assert scratch.names(b"file") == []


def test_a_client_that_cannot_say_what_it_has_open_has_time_to_come_back(
    server: TimedServer, scratch: Scratch
) -> None:
    """However short the time to live is."""
    scratch.set(scratch.directory, b"1")
    scratch.file(b"file")
    server.leap(14)
    assert scratch.names(b"file") == [b"file"]
    server.leap(2)
    assert scratch.names(b"file") == []


def test_others_are_told_and_an_open_file_lives_on_as_an_orphan(
    server: TimedServer, scratch: Scratch
) -> None:
    """Should it come to that: the client does have it open, and did not say so."""
    file = scratch.file(b"file")
    server.now_s += HOUR_S - 1
    server.ask(scratch.client, Opcode.GET_ATTRIBUTES, GetAttributes(file))
    server.now_s += 2
    server.expire()
    entries = server.answer(scratch.client, file)
    assert {(entry.ino, entry.name) for entry in entries} >= {(scratch.directory, b"file")}
    assert (file, True) in {(entry.ino, entry.removed) for entry in entries}
    assert scratch.names(b"file") == []
    node = server.ask(scratch.client, Opcode.GET_ATTRIBUTES, GetAttributes(file))
    assert node.nlink == 0


def test_each_name_of_a_file_goes(server: TimedServer, scratch: Scratch) -> None:
    file = scratch.file(b"file")
    request = LinkNode(file, scratch.directory, b"other")
    server.ask(scratch.client, Opcode.LINK_NODE, request)
    for _ in range(2):
        server.leap(HOUR_S + 1)
    assert scratch.names(b"file", b"other") == []


def test_a_file_may_have_a_time_of_its_own(server: TimedServer, scratch: Scratch) -> None:
    file = scratch.file(b"file", ROOT_INODE)
    scratch.file(b"other", ROOT_INODE)
    scratch.set(file, b"1m")
    server.leap(61)
    assert scratch.names(b"file", b"other", parent=ROOT_INODE) == [b"other"]


def test_a_time_that_is_set_while_nothing_else_is_due(
    server: TimedServer, scratch: Scratch
) -> None:
    file = scratch.file(b"file", ROOT_INODE)
    server.expire()
    scratch.set(file, b"1m")
    server.leap(61)
    assert scratch.names(b"file", parent=ROOT_INODE) == []


def test_zero_or_removed_is_never(server: TimedServer, scratch: Scratch) -> None:
    zero, removed = scratch.file(b"zero"), scratch.file(b"removed")
    scratch.set(zero, b"0")
    request = RemoveXattr(removed, b"user.crail.ttl")
    server.ask(scratch.client, Opcode.REMOVE_XATTR, request)
    server.leap(100 * HOUR_S)
    assert scratch.names(b"zero", b"removed") == [b"zero", b"removed"]


def test_what_is_made_below_the_root_directory_has_the_roots_time(
    server: TimedServer, scratch: Scratch
) -> None:
    scratch.set(ROOT_INODE, b"1h")
    scratch.server.expire()
    scratch.file(b"file", ROOT_INODE)
    server.leap(HOUR_S + 1)
    assert scratch.names(b"file", parent=ROOT_INODE) == []


def test_a_round_comes_to_its_end_however_often_times_to_live_are_set(
    server: TimedServer, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "ROWS_MAX", 10)
    other = scratch.mkdir(b"other", ROOT_INODE)
    for number in range(50):
        scratch.file(b"%02d" % number, ROOT_INODE)
    scratch.file(b"behind them")
    server.leap(HOUR_S + 1)
    scratch.client = server.connect(2)
    scratch.file(b"behind them")
    server.now_s += HOUR_S + 1
    for _ in range(30):
        server.handler.expire_nodes()
        scratch.set(other, b"2h")
    assert scratch.names(b"behind them") == []


def test_steps_are_bounded_and_files_that_come_meanwhile_are_found(
    server: TimedServer, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "ROWS_MAX", 10)
    monkeypatch.setattr(expiry, "REMOVALS_MAX", 4)
    for number in range(50):
        scratch.file(b"%02d" % number)
    server.leap(HOUR_S / 2)
    scratch.client = server.connect(2)
    for number in range(50, 70):
        scratch.file(b"%02d" % number)
    server.now_s += HOUR_S / 2 + 1
    server.handler.tick()
    removed = server.handler.counters()["nodes_expired"]
    for _ in range(3):
        assert server.handler.expire_nodes()
        now_removed = server.handler.counters()["nodes_expired"]
        assert now_removed - removed <= 4
        removed = now_removed
    assert server.expire() >= 10
    assert server.handler.counters()["nodes_expired"] == 50
    server.leap(HOUR_S / 2)
    assert server.handler.counters()["nodes_expired"] == 70


def test_without_a_time_to_live_nothing_is_looked_for(server: TimedServer) -> None:
    client = server.connect(1)
    for number in range(1_000):
        server.create(client, b"%d" % number)
    assert server.expire() >= 1_000 // expiry.ROWS_MAX
    assert server.expire() == 1
    server.pass_time(60)
    assert server.expire() == 1


@pytest.mark.slow
def test_a_step_among_100_000_files_is_short(server: TimedServer, scratch: Scratch) -> None:
    for number in range(100_000):
        request = CreateNode(scratch.directory, b"%d" % number, NodeKind.FILE, 0o644, 0, 0)
        server.driver.execute(0, 0, Opcode.CREATE_NODE, request)
    server.driver.checkpoint()
    looking = _times_of_steps(server)
    server.now_s += HOUR_S + 1
    server.handler.tick()
    removing = _times_of_steps(server)
    print(f"{len(looking)} steps of {_milliseconds(looking)} to look at 100,000 entries")
    print(f"{len(removing)} steps of {_milliseconds(removing)} to remove them")
    assert server.handler.counters()["nodes_expired"] == 100_000
    assert sorted(removing)[len(removing) // 2] < 0.05


def _times_of_steps(server: TimedServer) -> list[float]:
    times = []
    while True:
        before = time.perf_counter()
        more = server.handler.expire_nodes()
        times.append(time.perf_counter() - before)
        if not more:
            return times


def _milliseconds(times: list[float]) -> str:
    ordered = sorted(times)
    return f"{1000 * ordered[len(ordered) // 2]:.1f} ms, at most {1000 * ordered[-1]:.1f} ms"
