"""The driver: undo, duplicates, restarts, what it refuses to open, a full disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lmdb
import pytest

from crailfs.config import MetadataConfig
from crailfs.errors import (
    BusyError,
    ConfigurationError,
    ExistsError,
    InternalError,
    NoSpaceError,
    NotFoundError,
    ProtocolError,
)
from crailfs.limits import CHECKPOINT_INTERVAL_MS, REPLIES_KEPT_PER_CLIENT_MAX
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import CreateNode, Lookup, Opcode, RemoveNode
from metadata_server import ops, schema
from metadata_server.context import Context
from metadata_server.driver import Driver
from metadata_server.txn import Txn
from tests.metadata.name_space import CLIENT, NameSpace, config


def _create(name: bytes) -> CreateNode:
    return CreateNode(ROOT_INODE, name, NodeKind.FILE, 0o644, 0, 0)


def _rows(driver: Driver) -> dict[tuple[bytes, bytes], bytes]:
    """Everything in the name space but what each start changes."""
    rows = driver.run(
        lambda txn, _: {(table, key): v for table in schema.TABLES for key, v in txn.scan(table)}
    )
    for key in (b"epoch", b"clean", b"journal_sequence"):
        del rows[schema.STATE, key]
    return rows


# --- operations ---------------------------------------------------------------------------------


def test_an_operation_that_is_refused_leaves_nothing(space: NameSpace) -> None:
    space.create(b"a")
    before = _rows(space.driver)

    def refused(txn: Txn, request: Any, context: Context) -> Any:
        ops.create_node.run(txn, request, context)
        raise NotFoundError("after all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.RUN, Opcode.CREATE_NODE, refused)
        outcome = space.driver.execute(CLIENT, 100, Opcode.CREATE_NODE, _create(b"b"))
    assert isinstance(outcome.reply, NotFoundError)
    assert outcome.invalidations == ()
    assert _rows(space.driver) == before


def test_an_operation_that_breaks_is_undone_and_logged(
    space: NameSpace, caplog: pytest.LogCaptureFixture
) -> None:
    before = _rows(space.driver)

    def broken(txn: Txn, request: Any, context: Context) -> Any:
        ops.create_node.run(txn, request, context)
        raise ZeroDivisionError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.RUN, Opcode.CREATE_NODE, broken)
        outcome = space.driver.execute(CLIENT, 100, Opcode.CREATE_NODE, _create(b"b"))
    assert isinstance(outcome.reply, InternalError)
    assert "ZeroDivisionError: a bug" in caplog.text
    assert _rows(space.driver) == before
    space.create(b"b")


def test_internal_operations_are_undone_and_journaled_alike(space: NameSpace) -> None:
    before = _rows(space.driver)

    def fails(txn: Txn, context: Context) -> None:
        txn.put(schema.FREE, b"x", b"y")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        space.driver.run(fails)
    assert _rows(space.driver) == before
    space.driver.run(lambda txn, context: txn.put(schema.REPLIES, b"x", b"%d" % context.client_id))
    space.driver.write_batch()
    _crash(space)
    assert _rows(space.driver)[schema.REPLIES, b"x"] == b"0"


def test_holders_are_asked_for_the_others(space: NameSpace) -> None:
    asked = []

    def holders(ino: int, asking_client: int) -> frozenset[int]:
        asked.append((ino, asking_client))
        return frozenset()

    file = space.create(b"a").ino
    space.driver.holders = holders
    space.remove(b"a", not_open=file)
    assert (file, CLIENT) in asked


# --- duplicates ---------------------------------------------------------------------------------


def test_a_request_that_comes_again_gets_its_first_answer(space: NameSpace) -> None:
    first = space.driver.execute(CLIENT, 50, Opcode.CREATE_NODE, _create(b"a"))
    again = space.driver.execute(CLIENT, 50, Opcode.CREATE_NODE, _create(b"a"))
    assert again.reply == first.reply
    assert again.invalidations == ()
    other_client = space.driver.execute(CLIENT + 1, 50, Opcode.CREATE_NODE, _create(b"a"))
    assert isinstance(other_client.reply, ExistsError)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_duplicates_are_known_after_a_crash(space: NameSpace, checkpoint: bool) -> None:
    requests = [
        (50, Opcode.CREATE_NODE, _create(b"a")),
        (51, Opcode.REMOVE_NODE, RemoveNode(ROOT_INODE, b"a", False)),
        (52, Opcode.CREATE_NODE, _create(b"a")),
    ]
    first = [space.driver.execute(CLIENT, *request).reply for request in requests]
    space.driver.write_batch()
    if checkpoint:
        space.driver.checkpoint()
    _crash(space)
    assert [space.driver.execute(CLIENT, *request).reply for request in requests] == first
    assert space.names() == [b"a"]
    space.release(first[1].ino)  # type: ignore[union-attr]


def test_a_refused_request_is_tried_anew(space: NameSpace) -> None:
    request = RemoveNode(ROOT_INODE, b"a", False)
    outcome = space.driver.execute(CLIENT, 50, Opcode.REMOVE_NODE, request)
    assert isinstance(outcome.reply, NotFoundError)
    file = space.create(b"a").ino
    request = RemoveNode(ROOT_INODE, b"a", False, file)
    outcome = space.driver.execute(CLIENT, 50, Opcode.REMOVE_NODE, request)
    assert not isinstance(outcome.reply, Exception)


def test_a_request_id_cannot_be_used_for_something_else(space: NameSpace) -> None:
    space.driver.execute(CLIENT, 50, Opcode.CREATE_NODE, _create(b"a"))
    request = RemoveNode(ROOT_INODE, b"a", False)
    outcome = space.driver.execute(CLIENT, 50, Opcode.REMOVE_NODE, request)
    assert isinstance(outcome.reply, ProtocolError)
    assert space.names() == [b"a"]


def test_internal_requests_and_reads_are_not_remembered(space: NameSpace) -> None:
    space.driver.execute(CLIENT, 0, Opcode.CREATE_NODE, _create(b"a"))
    space.driver.execute(CLIENT, 60, Opcode.LOOKUP, Lookup(ROOT_INODE, b"a"))
    assert _replies(space) == 0


def test_remembered_replies_are_bounded(space: NameSpace) -> None:
    kept = REPLIES_KEPT_PER_CLIENT_MAX
    for request_id in (1, 2, 3, kept + 1, kept + 2):
        space.driver.execute(CLIENT, request_id, Opcode.CREATE_NODE, _create(b"%d" % request_id))
    assert _replies(space) == 3


def _replies(space: NameSpace) -> int:
    return space.driver.run(lambda txn, _: txn.row_count(schema.REPLIES))


# --- restarts -----------------------------------------------------------------------------------


def _crash(space: NameSpace) -> None:
    """Let go of the state as a process that is killed does, and open it again."""
    space.driver._txn.abort()
    space.driver._state.close()
    space.driver = Driver.open(config(space.state), clock_ns=space.clock)


def test_a_clean_stop_and_a_crash_are_told_apart(space: NameSpace) -> None:
    assert (space.driver.epoch, space.driver.was_clean) == (1, True)
    cluster_id = space.driver.cluster_id
    space.create(b"a")
    space.reopen()
    assert (space.driver.epoch, space.driver.was_clean) == (2, True)
    _crash(space)
    assert (space.driver.epoch, space.driver.was_clean) == (3, False)
    assert space.driver.cluster_id == cluster_id
    assert space.names() == [b"a"]


def test_what_was_written_outlives_a_crash_and_the_rest_does_not(space: NameSpace) -> None:
    space.create(b"a")
    before = _rows(space.driver)
    space.driver.execute(CLIENT, 0, Opcode.CREATE_NODE, _create(b"b"))
    _crash(space)
    assert _rows(space.driver) == before


def test_inode_numbers_are_not_reused(space: NameSpace) -> None:
    first = space.create(b"a").ino
    space.remove(b"a", not_open=first)
    _crash(space)
    assert space.create(b"a").ino > first


def test_a_checkpoint_is_due_by_age_or_size(
    space: NameSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.clock.now_ns += CHECKPOINT_INTERVAL_MS * 1_000_000
    assert not space.driver.checkpoint_due, "nothing has changed"
    space.create(b"a")
    assert space.driver.checkpoint_due
    space.driver.checkpoint()
    space.create(b"b")
    assert not space.driver.checkpoint_due
    monkeypatch.setattr("metadata_server.driver.JOURNAL_CHECKPOINT_BYTES", 100)
    assert space.driver.checkpoint_due


def test_the_journal_is_empty_after_a_checkpoint(space: NameSpace) -> None:
    space.create(b"a")
    journal = space.state / "journal"
    full_bytes = journal.stat().st_size
    space.driver.checkpoint()
    assert journal.stat().st_size < full_bytes
    before = _rows(space.driver)
    _crash(space)
    assert _rows(space.driver) == before


def test_closing_twice_is_closing_once(space: NameSpace) -> None:
    space.driver.close()
    space.driver.close()
    space.reopen()


# --- a disk that is full ------------------------------------------------------------------------


_pwrite = os.pwrite


def _full(descriptor: int, data: bytes, offset: int) -> int:
    """Of a file that cannot grow."""
    if offset + len(data) <= os.fstat(descriptor).st_size:
        return _pwrite(descriptor, data, offset)
    raise OSError(28, "No space left on device")


def test_a_journal_that_cannot_be_written_becomes_a_checkpoint(space: NameSpace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", _full)
        space.create(b"a")
    before = _rows(space.driver)
    _crash(space)
    assert _rows(space.driver) == before
    assert space.names() == [b"a"]


def test_when_nothing_can_be_written_what_was_acknowledged_stays(space: NameSpace) -> None:
    space.create(b"acknowledged")
    before = _rows(space.driver)
    space.driver.execute(CLIENT, 0, Opcode.CREATE_NODE, _create(b"dropped"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", _full)
        patch.setattr(Txn, "commit_as", _raise_disk_error)
        with pytest.raises(OSError, match="make room there") as raised:
            space.driver.write_batch()
        assert raised.value.filename == str(space.state)
        space.driver.close()
        with pytest.raises(NoSpaceError, match="make room there"):
            Driver.open(config(space.state))
        patch.undo()
        patch.setattr(Txn, "commit_as", _raise_disk_error)
        with pytest.raises(NoSpaceError, match="make room there"):
            Driver.open(config(space.state))
    space.driver = Driver.open(config(space.state))
    assert not space.driver.was_clean
    assert _rows(space.driver) == before


def test_a_checkpoint_that_fails_leaves_the_journal(
    space: NameSpace, caplog: pytest.LogCaptureFixture
) -> None:
    space.create(b"a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Txn, "commit_as", _raise_disk_error)
        space.driver.checkpoint()
    assert "will try again" in caplog.text
    space.create(b"b")
    assert space.names() == [b"a", b"b"]
    before = _rows(space.driver)
    _crash(space)
    assert _rows(space.driver) == before
    space.driver.checkpoint()
    assert space.names() == [b"a", b"b"]


def _raise_disk_error(*arguments: Any) -> None:
    raise lmdb.DiskError("mdb_txn_commit: No space left on device")


def test_lmdb_failing_in_an_operation_drops_only_that(
    space: NameSpace, caplog: pytest.LogCaptureFixture
) -> None:
    space.create(b"written")
    space.driver.execute(CLIENT, 0, Opcode.CREATE_NODE, _create(b"pending"))
    before = _rows(space.driver)

    def fails(txn: Txn, request: Any, context: Context) -> Any:
        ops.create_node.run(txn, request, context)
        raise lmdb.MapFullError("mdb_put: full")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setitem(ops.RUN, Opcode.CREATE_NODE, fails)
        outcome = space.driver.execute(CLIENT, 70, Opcode.CREATE_NODE, _create(b"dropped"))
    assert isinstance(outcome.reply, NoSpaceError)
    assert _rows(space.driver) == before
    space.driver.write_batch()
    _crash(space)
    assert space.names() == [b"pending", b"written"]


# --- what cannot be opened ----------------------------------------------------------------------


def test_a_state_directory_has_one_server(space: NameSpace) -> None:
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        Driver.open(config(space.state))


def test_the_cluster_id_is_the_configured_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    driver = Driver.open(config(state, cluster_id=b"i" * 16))
    assert driver.cluster_id == b"i" * 16
    driver.close()
    with pytest.raises(ConfigurationError, match=(b"j" * 16).hex()):
        Driver.open(config(state, cluster_id=b"j" * 16))
    Driver.open(config(state)).close()


@pytest.mark.parametrize("size_bytes", [0, 2048, 5000, 2 << 20])
def test_an_impossible_block_size_is_refused(tmp_path: Path, size_bytes: int) -> None:
    good = config(tmp_path / "state")
    bad = MetadataConfig(
        state=good.state, listen=(), credentials=good.credentials, block_size_bytes=size_bytes
    )
    with pytest.raises(ConfigurationError, match=str(size_bytes)):
        Driver.open(bad)
    Driver.open(good).close()


def test_another_format_is_refused(space: NameSpace) -> None:
    space.driver.run(lambda txn, _: txn.set_state(b"format_version", 99))
    space.driver.close()
    with pytest.raises(ConfigurationError, match="format 99"):
        Driver.open(config(space.state))
    _rewrite_format(space)


def _rewrite_format(space: NameSpace) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "FORMAT_VERSION", 99)
        space.driver = Driver.open(config(space.state), clock_ns=space.clock)
