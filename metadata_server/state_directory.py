"""The metadata server's directory: its lock, its LMDB environment, its journal; made and opened.

    lock         flock of the one process that has the directory; holds its pid
    lmdb/        the LMDB environment
    journal      see ``journal.py``

A new name space is built aside and renamed into place. From then on LMDB without a journal, or a
journal without LMDB, is damage; only between that rename and the first start (epoch 0) may the
journal be missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import lmdb

from crailfs.config import MetadataConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError, NoSpaceError
from crailfs.limits import BLOCK_SIZE_MAX_BYTES, BLOCK_SIZE_MIN_BYTES, LMDB_MAP_BYTES
from crailfs.records import Attributes, NodeKind, Placement
from crailfs.units import ROOT_INODE
from metadata_server import schema
from metadata_server.journal import Journal, sync_directory
from metadata_server.lmdb_check import check_database
from metadata_server.txn import Txn

_CLUSTER_ID_BYTES = 16
_SINCE_VERSION_2 = frozenset({schema.HEADER_LOG, b"next_header_change", b"salvaging"})
"""Tables and state that a directory of version 1 does not have."""


class StateDirectory:
    """An open, locked and recovered state directory."""

    journal: Journal
    handles: dict[bytes, Any]
    """LMDB's handle of each table."""
    was_clean: bool
    """Whether the last run ended in order."""

    def __init__(self, config: MetadataConfig, now_ns: int) -> None:
        """Lock the directory, make a name space if it is empty, recover it otherwise.

        BusyError, ConfigurationError or DamagedError says what is wrong and what to do.
        """
        self.path = config.state
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, _lock(self.path / "lock"))
            journal_path, lmdb_path = self.path / "journal", self.path / "lmdb"
            if not lmdb_path.exists():
                if journal_path.exists():
                    raise _damaged(self.path, "there is a journal, but no LMDB database")
                _make_name_space(config, now_ns)
            database = lmdb_path / "data.mdb"
            if not database.exists():
                raise _damaged(self.path, f"{database.name} is missing")
            check_database(database)
            try:
                self._environment = _open_environment(lmdb_path)
                stack.callback(self._environment.close)
                self._recover(config, journal_path)
            except (lmdb.DiskError, lmdb.MapFullError) as error:
                raise _unwritable(self.path, error) from error
            except lmdb.Error as error:
                raise _damaged(self.path, f"LMDB says: {error}") from error
            stack.callback(self.journal.close)
            self._resources = stack.pop_all()

    def begin(self) -> lmdb.Transaction:
        transaction: lmdb.Transaction = self._environment.begin(write=True)
        return transaction

    def close(self) -> None:
        """Let go of everything; what a transaction did since the last commit is lost."""
        self._resources.close()

    def _recover(self, config: MetadataConfig, journal_path: Path) -> None:
        """Apply the journal, begin the next epoch and a journal of its own."""
        with self.begin() as transaction:
            self.handles = {
                table: self._environment.open_db(
                    table, transaction, create=table in _SINCE_VERSION_2
                )
                for table in schema.TABLES
            }
        txn = Txn(self.handles, self.begin())
        try:
            cluster_id = _check_identity(config, txn)
            if not journal_path.exists():
                if txn.state(b"epoch") > 0:
                    raise _damaged(self.path, "its journal is missing")
                Journal.create(journal_path, cluster_id, 0).close()
            with contextlib.closing(Journal.open(journal_path, cluster_id)) as journal:
                apply_journal(journal, txn)
                sequence = journal.sequence
            _upgrade(txn)
            self.was_clean = txn.state(b"clean")
            txn.next_counter(b"epoch")
            txn.set_state(b"clean", False)
            txn.commit_as(sequence)
        finally:
            txn.abort()
        self.journal = Journal.create(journal_path, cluster_id, sequence)


def apply_journal(journal: Journal, txn: Txn) -> None:
    """Apply what the journal has beyond LMDB's last commit."""
    for record in journal.replay(txn.state(b"journal_sequence")):
        txn.apply(record.rows)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise BusyError(
            f"{path.parent} is used by another metadata server (process {holder}): stop that one, "
            f"or use another state directory"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise _unwritable(path.parent, error) from error
    return descriptor


def _open_environment(path: Path) -> lmdb.Environment:
    # The directory's lock keeps other processes out, and there is one transaction at a time: LMDB
    # needs no locks of its own. Commits are synced, data before meta page.
    return lmdb.open(
        str(path),
        map_size=LMDB_MAP_BYTES,
        max_dbs=len(schema.TABLES),
        lock=False,
        readahead=False,
        meminit=False,
    )


def _make_name_space(config: MetadataConfig, now_ns: int) -> None:
    """Build an empty name space beside its place, then put it there."""
    block_size_bytes = config.block_size_bytes
    if not BLOCK_SIZE_MIN_BYTES <= block_size_bytes <= BLOCK_SIZE_MAX_BYTES or block_size_bytes & (
        block_size_bytes - 1
    ):
        raise ConfigurationError(
            f"block size of {block_size_bytes} bytes: expected a power of two between "
            f"{BLOCK_SIZE_MIN_BYTES} and {BLOCK_SIZE_MAX_BYTES}"
        )
    new_path = config.state / "lmdb.new"
    shutil.rmtree(new_path, ignore_errors=True)
    environment = _open_environment(new_path)
    try:
        handles = {table: environment.open_db(table) for table in schema.TABLES}
        txn = Txn(handles, environment.begin(write=True))
        txn.set_state(b"format_version", schema.FORMAT_VERSION)
        txn.set_state(b"cluster_id", config.credentials.cluster_id or os.urandom(_CLUSTER_ID_BYTES))
        txn.set_state(b"block_size_bytes", block_size_bytes)
        txn.set_state(b"epoch", 0)
        for counter in (
            b"next_generation",
            b"next_region",
            b"next_reclaim",
            b"next_header_change",
        ):
            txn.set_state(counter, 1)
        txn.set_state(b"salvaging", False)
        txn.set_state(b"next_ino", ROOT_INODE + 1)
        txn.set_state(b"node_count", 1)
        txn.set_state(b"clean", True)
        txn.put_node(_root(now_ns))
        txn.commit_as(0)
    finally:
        environment.close()
    sync_directory(new_path)
    os.rename(new_path, config.state / "lmdb")
    sync_directory(config.state)


def _root(now_ns: int) -> Attributes:
    """The root directory, owned by whoever runs the server."""
    return Attributes(
        ino=ROOT_INODE,
        kind=NodeKind.DIRECTORY,
        mode=0o755,
        uid=os.getuid(),
        gid=os.getgid(),
        nlink=2,
        size=0,
        block_count=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        btime_ns=now_ns,
        rdev=0,
        parent=ROOT_INODE,
        data_version=1,
        placement=Placement(),
    )


def _check_identity(config: MetadataConfig, txn: Txn) -> bytes:
    """Refuse a state of another format or cluster; returns the cluster's id."""
    version = txn.state(b"format_version")
    if not 1 <= version <= schema.FORMAT_VERSION:
        raise ConfigurationError(
            f"{config.state} has format {version}, this server reads {schema.FORMAT_VERSION}: use "
            f"the version of CrailFS that made it"
        )
    cluster_id: bytes = txn.state(b"cluster_id")
    wanted = config.credentials.cluster_id
    if wanted and wanted != cluster_id:
        raise ConfigurationError(
            f"{config.state} belongs to cluster {cluster_id.hex()}, the configuration names "
            f"{wanted.hex()}: correct the cluster id or use another state directory"
        )
    expected = [key for key in schema.STATE_KEYS if version > 1 or key not in _SINCE_VERSION_2]
    missing = [key.decode() for key in expected if txn.get(schema.STATE, key) is None]
    if missing or txn.find_node(ROOT_INODE) is None:
        raise _damaged(config.state, f"it lacks {', '.join(missing) or 'the root directory'}")
    return cluster_id


def _upgrade(txn: Txn) -> None:
    """Bring the state of an earlier version up to this one, in the transaction of the start."""
    if txn.state(b"format_version") == 1:
        txn.set_state(b"next_header_change", 1)
        txn.set_state(b"salvaging", False)
        txn.set_state(b"format_version", schema.FORMAT_VERSION)


def _unwritable(path: Path, error: Exception) -> NoSpaceError:
    return NoSpaceError(
        f"state directory {path} cannot be written: {error}. Nothing was lost; make room there (or "
        "look at the device), then start the server again"
    )


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"state directory {path} is damaged: {what}. Nothing was changed. Restore it from a "
        f"backup; 'crail fsck' shows what a restored one holds"
    )
