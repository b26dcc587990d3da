"""The transaction: reads, scans, undo, and what it remembers for the journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crailfs.errors import DamagedError, StaleError
from metadata_server import schema
from metadata_server.txn import Change, Txn


def _open(path: Path) -> tuple[lmdb.Environment, Txn]:
    environment = lmdb.open(str(path), map_size=1 << 26, max_dbs=len(schema.TABLES), sync=False)
    handles = {table: environment.open_db(table) for table in schema.TABLES}
    return environment, Txn(handles, environment.begin(write=True))


@pytest.fixture
def txn(tmp_path: Path) -> Iterator[Txn]:
    environment, txn = _open(tmp_path)
    yield txn
    txn.abort()
    environment.close()


def test_rows(txn: Txn) -> None:
    assert txn.get(schema.FREE, b"k") is None
    txn.put(schema.FREE, b"k", b"1")
    assert (txn.get(schema.FREE, b"k"), txn.get(schema.GRANTS, b"k")) == (b"1", None)
    assert txn.delete(schema.FREE, b"k")
    assert not txn.delete(schema.FREE, b"k")
    assert txn.get(schema.FREE, b"k") is None


def test_append_refuses_a_key_that_is_not_last(txn: Txn) -> None:
    txn.append(schema.NODES, b"b", b"1")
    for key in (b"a", b"b"):
        with pytest.raises(ValueError, match="nodes"):
            txn.append(schema.NODES, key, b"2")
    assert txn.row_count(schema.NODES) == 1


def test_scans(txn: Txn) -> None:
    for key in (b"a", b"ab", b"b", b"bc", b"c"):
        txn.put(schema.FREE, key, key)
    assert [key for key, _ in txn.scan(schema.FREE)] == [b"a", b"ab", b"b", b"bc", b"c"]
    assert [key for key, _ in txn.scan(schema.FREE, b"aa", b"bc")] == [b"ab", b"b"]
    assert [key for key, _ in txn.scan_prefix(schema.FREE, b"b")] == [b"b", b"bc"]
    assert list(txn.scan(schema.FREE, b"d")) == list(txn.scan_prefix(schema.FREE, b"d")) == []
    assert txn.last_before(schema.FREE, b"b") == (b"ab", b"ab")
    assert txn.last_before(schema.FREE, b"z") == txn.last(schema.FREE) == (b"c", b"c")
    assert txn.last_before(schema.FREE, b"a") is None
    assert txn.last(schema.GRANTS) is None


def test_counters_and_missing_things(txn: Txn) -> None:
    txn.set_state(b"next_ino", 5)
    assert [txn.next_counter(b"next_ino"), txn.next_counter(b"next_ino", 10)] == [5, 6]
    assert txn.state(b"next_ino") == 16
    with pytest.raises(DamagedError, match="epoch"):
        txn.state(b"epoch")
    with pytest.raises(StaleError):
        txn.node(1)


def test_changes_have_both_values(txn: Txn) -> None:
    txn.put(schema.NODES, b"k", b"1")
    txn.put(schema.NODES, b"k", b"2")
    txn.put(schema.NODES, b"k", b"2")
    txn.delete(schema.NODES, b"k")
    assert txn.take_changes() == [
        Change(1, b"k", b"1", None),
        Change(1, b"k", b"2", b"1"),
        Change(1, b"k", None, b"2"),
    ]
    assert txn.changes == []


rows = st.dictionaries(
    st.tuples(st.sampled_from(schema.TABLES), st.binary(min_size=1, max_size=2)),
    st.binary(max_size=2),
    max_size=20,
)
steps = st.lists(
    st.tuples(
        st.sampled_from(schema.TABLES), st.binary(min_size=1, max_size=2), st.none() | st.binary()
    ),
    max_size=30,
)


@given(before=rows, after=steps)
def test_undo_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[tuple[bytes, bytes], bytes],
    after: list[tuple[bytes, bytes, bytes | None]],
) -> None:
    environment, txn = _open(tmp_path_factory.mktemp("lmdb"))
    try:
        for (table, key), value in before.items():
            txn.put(table, key, value)
        mark = txn.mark()
        for table, key, value in after:
            if value is None:
                txn.delete(table, key)
            else:
                txn.put(table, key, value)
        txn.undo(mark)
        assert txn.mark() == mark
        found = {(table, key): value for table in schema.TABLES for key, value in txn.scan(table)}
        assert found == before
    finally:
        txn.abort()
        environment.close()
