"""The one write transaction through which every operation sees and changes the tables.

``Txn`` outlives the LMDB transaction beneath it: a checkpoint commits that one and attaches the
next. It remembers each operation's changes twice over, with the new value for the journal and with
the old value to take the operation back.

In LMDB, which has no checksums, each value is followed by one over its table, key and bytes: a row
that is not what was written is an error, never a value. All access to LMDB's rows is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import lmdb
from xxhash import xxh3_64_digest

from crailfs.errors import DamagedError, StaleError
from crailfs.records import Attributes
from metadata_server import schema


class Change(NamedTuple):
    """One row that an operation wrote or deleted."""

    table: int
    """Index in ``schema.TABLES``."""
    key: bytes
    value: bytes | None
    """None: the row is deleted."""
    old: bytes | None = None
    """The row's value before; None: there was no row."""


TABLE_NUMBERS = {table: number for number, table in enumerate(schema.TABLES)}
_STATE_NUMBER = TABLE_NUMBERS[schema.STATE]
_CHECKSUM_BYTES = 8


def _seal(table: int, key: bytes, value: bytes) -> bytes:
    """What is stored for the value."""
    return value + xxh3_64_digest(key + value, table)


def _unseal(table: int, key: bytes, stored: bytes) -> bytes:
    """The value that was stored; DamagedError if it is another one."""
    value = stored[:-_CHECKSUM_BYTES]
    if stored[-_CHECKSUM_BYTES:] != xxh3_64_digest(key + value, table):
        raise DamagedError(
            f"the metadata server's database is damaged: row {key.hex()} of table "
            f"{schema.TABLES[table].decode()} is not what was written. Stop the server and restore "
            "its state directory from a backup; 'crail fsck' shows what a restored one holds"
        )
    return value


class Txn:
    """Typed access to the tables of one always-open LMDB write transaction.

    Operations call what stands before ``mark``; the rest is for the driver.
    """

    def __init__(self, handles: Mapping[bytes, Any], transaction: lmdb.Transaction) -> None:
        self._handles = dict(handles)
        self._ordered_handles = [self._handles[table] for table in schema.TABLES]
        self._changes: list[Change] = []
        self.attach(transaction)

    # --- rows ---------------------------------------------------------------------------------

    def get(self, table: bytes, key: bytes) -> bytes | None:
        """The row's value, or None."""
        stored = self._get(key, None, self._handles[table])
        return None if stored is None else _unseal(TABLE_NUMBERS[table], key, stored)

    def put(self, table: bytes, key: bytes, value: bytes) -> None:
        """Insert the row or replace it."""
        number = TABLE_NUMBERS[table]
        old = self.get(table, key)
        if old == value:
            return
        self._write(number, key, value)
        self._changes.append(Change(number, key, value, old))

    def append(self, table: bytes, key: bytes, value: bytes) -> None:
        """Insert a row whose key is greater than every other of the table: fills its pages."""
        number = TABLE_NUMBERS[table]
        sealed = _seal(number, key, value)
        if not self._put(key, sealed, True, True, True, self._handles[table]):
            raise ValueError(f"{table.decode()}: {key.hex()} is not behind the last key")
        self._changes.append(Change(number, key, value, None))

    def delete(self, table: bytes, key: bytes) -> bool:
        """Remove the row; False if there was none."""
        old = self.get(table, key)
        if old is None:
            return False
        number = TABLE_NUMBERS[table]
        self._write(number, key, None)
        self._changes.append(Change(number, key, None, old))
        return True

    def scan(
        self, table: bytes, start: bytes = b"", end: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Rows with ``start`` <= key < ``end`` (None: to the table's end), in order of key.

        The table must not be changed before the iteration is over: collect first.
        """
        cursor = self._transaction.cursor(self._handles[table])
        if not cursor.set_range(start):
            return
        number = TABLE_NUMBERS[table]
        for key, stored in cursor:
            if end is not None and key >= end:
                return
            yield key, _unseal(number, key, stored)

    def scan_prefix(self, table: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Rows whose key begins with ``prefix``, in order of key; as careful as ``scan``."""
        cursor = self._transaction.cursor(self._handles[table])
        if not cursor.set_range(prefix):
            return
        number = TABLE_NUMBERS[table]
        for key, stored in cursor:
            if not key.startswith(prefix):
                return
            yield key, _unseal(number, key, stored)

    def last_before(self, table: bytes, key: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key that is less than ``key``."""
        cursor = self._transaction.cursor(self._handles[table])
        found = cursor.prev() if cursor.set_range(key) else cursor.last()
        return _item(table, cursor) if found else None

    def last(self, table: bytes) -> tuple[bytes, bytes] | None:
        """The row with the greatest key."""
        cursor = self._transaction.cursor(self._handles[table])
        return _item(table, cursor) if cursor.last() else None

    def row_count(self, table: bytes) -> int:
        count: int = self._transaction.stat(self._handles[table])["entries"]
        return count

    # --- typed rows -----------------------------------------------------------------------------

    def node(self, ino: int) -> Attributes:
        """The node's attributes; StaleError if it is gone (inode numbers are never reused)."""
        value = self.get(schema.NODES, schema.node_key(ino))
        if value is None:
            raise StaleError(f"inode {ino} no longer exists")
        return schema.decode_attributes(value)

    def find_node(self, ino: int) -> Attributes | None:
        """As ``node``, with None for a node that is gone."""
        value = self.get(schema.NODES, schema.node_key(ino))
        return None if value is None else schema.decode_attributes(value)

    def put_node(self, attributes: Attributes) -> None:
        self.put(schema.NODES, schema.node_key(attributes.ino), schema.encode(attributes))

    def entry(self, parent: int, name: bytes) -> int | None:
        """The inode that ``name`` in ``parent`` points to, or None."""
        value = self.get(schema.ENTRIES, schema.entry_key(parent, name))
        return None if value is None else schema.unpack_u64(value)

    def state(self, name: bytes) -> Any:
        """A scalar of the ``state`` table (see ``schema.STATE_KEYS`` for its type)."""
        value = self.get(schema.STATE, name)
        if value is None:
            raise DamagedError(
                f"the name space has no {name.decode()!r} in its state table: restore the metadata "
                f"server's state directory from a backup"
            )
        return schema.decode_scalar(value)

    def set_state(self, name: bytes, value: int | bytes | bool) -> None:
        self.put(schema.STATE, name, schema.encode(value))

    def next_counter(self, name: bytes, count: int = 1) -> int:
        """Take ``count`` numbers from a counter of the ``state`` table; returns the first."""
        first: int = self.state(name)
        self.set_state(name, first + count)
        return first

    # --- for the driver -------------------------------------------------------------------------

    def attach(self, transaction: lmdb.Transaction) -> None:
        """Go on over another LMDB transaction."""
        # Opened without buffers=True, LMDB gives bytes and nothing else; its types cannot say so.
        self._transaction: Any = transaction
        self._get: Callable[..., Any] = transaction.get
        self._put: Callable[..., bool] = transaction.put
        self._pop: Callable[..., Any] = transaction.pop

    def mark(self) -> int:
        """Where the changes of the next operation begin."""
        return len(self._changes)

    def undo(self, mark: int) -> None:
        """Take back every change since ``mark``."""
        for change in reversed(self._changes[mark:]):
            self._write(change.table, change.key, change.old)
        del self._changes[mark:]

    def forget(self, mark: int) -> None:
        """Drop the record of the changes since ``mark``: their transaction is lost anyway."""
        del self._changes[mark:]

    def reapply(self) -> None:
        """Make the remembered changes again, in a transaction that has not seen them."""
        self.apply((change.table, change.key, change.value) for change in self._changes)

    def commit_as(self, journal_sequence: int) -> None:
        """Commit, synced, as the state that has all journal records up to this one; ``attach``
        must follow. lmdb.Error: nothing was committed."""
        self.apply([(_STATE_NUMBER, b"journal_sequence", schema.encode(journal_sequence))])
        self._transaction.commit()

    def abort(self) -> None:
        """End the LMDB transaction, if it has not ended, without a trace."""
        self._transaction.abort()

    @property
    def changes(self) -> list[Change]:
        """All since the last ``take_changes``, in order."""
        return self._changes

    def take_changes(self) -> list[Change]:
        """The changes since the last call; the caller has them from now on."""
        changes = self._changes
        self._changes = []
        return changes

    def apply(self, rows: Iterable[tuple[int, bytes, bytes | None]]) -> None:
        """Write rows (table number, key, value or None) without remembering them as changes."""
        for table, key, value in rows:
            self._write(table, key, value)

    def _write(self, table: int, key: bytes, value: bytes | None) -> None:
        if value is None:
            self._pop(key, self._ordered_handles[table])
        else:
            stored = _seal(table, key, value)
            self._put(key, stored, True, True, False, self._ordered_handles[table])


def _item(table: bytes, cursor: Any) -> tuple[bytes, bytes]:
    key, stored = cursor.item()
    return key, _unseal(TABLE_NUMBERS[table], key, stored)
