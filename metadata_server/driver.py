"""Runs operations: transaction, undo, journal, replies of duplicates, checkpoints, recovery.

One thread calls everything here but ``sync_journal``. An operation's changes are in the open LMDB
transaction at once, in the journal after ``write_batch`` and in LMDB's file after ``checkpoint``.
Whatever ends the process, what the journal has is applied again by ``Driver.open``.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import lmdb
import msgspec

from crailfs.config import MetadataConfig
from crailfs.errors import CrailError, DamagedError, InternalError, NoSpaceError, ProtocolError
from crailfs.limits import (
    CHECKPOINT_INTERVAL_MS,
    JOURNAL_CHECKPOINT_BYTES,
    REPLIES_KEPT_PER_CLIENT_MAX,
)
from crailfs.records import Record
from crailfs.wire.messages import OPERATIONS, AuditReply, Invalidation, Message, Opcode
from metadata_server import audit, schema, space
from metadata_server.context import Context
from metadata_server.ops import RUN
from metadata_server.state_directory import StateDirectory, apply_journal
from metadata_server.txn import Txn

log = logging.getLogger(__name__)

T = TypeVar("T")

_REPLY_OPCODE = struct.Struct(">H")
_REMEMBERED = frozenset(opcode for opcode in RUN if OPERATIONS[opcode].mutates)
_REPLY_DECODERS = {
    opcode: msgspec.msgpack.Decoder(OPERATIONS[opcode].reply) for opcode in _REMEMBERED
}
_NANOSECONDS_PER_MILLISECOND = 1_000_000


class Outcome(NamedTuple):
    """What one request led to."""

    reply: Record | CrailError
    invalidations: tuple[Invalidation, ...] = ()
    """What other clients must forget before the reply leaves."""
    shown: tuple[int, ...] = ()
    """Inodes on which the asking client gets a lease."""


def _nobody(ino: int, asking_client: int) -> frozenset[int]:
    return frozenset()


class Driver:
    """The name space of one metadata server, open for changes."""

    def __init__(self, state: StateDirectory, clock_ns: Callable[[], int]) -> None:
        self._state = state
        self._clock_ns = clock_ns
        self._txn = Txn(state.handles, state.begin())
        self._last_checkpoint_ns = clock_ns()
        self._closed = False
        self._is_stuck = False
        """Neither journal nor LMDB could be written: what is in memory alone is to be dropped."""
        self.holders: Callable[[int, int], frozenset[int]] = _nobody
        """(inode, asking client) -> the other clients that hold a lease on it."""
        self.cluster_id: bytes = self._txn.state(b"cluster_id")
        self.block_size_bytes: int = self._txn.state(b"block_size_bytes")
        self.epoch: int = self._txn.state(b"epoch")
        self._find_regions()
        self.synced_header_changes = self.next_header_change
        """Those below it outlive a power cut: the state is recovered, committed and synced."""
        self.was_clean = state.was_clean
        """Whether the last run ended by ``close``."""

    @classmethod
    def open(cls, config: MetadataConfig, *, clock_ns: Callable[[], int] = time.time_ns) -> Driver:
        """Open the state directory, or make a new name space in an empty one.

        BusyError: another process has it. DamagedError, ConfigurationError: it cannot be used; the
        message says what to do, and nothing was changed.
        """
        state = StateDirectory(config, clock_ns())
        try:
            return cls(state, clock_ns)
        except BaseException:
            state.close()
            raise

    # --- operations -----------------------------------------------------------------------------

    def execute(self, client_id: int, request_id: int, opcode: Opcode, request: Message) -> Outcome:
        """Run one operation, or find the reply that it had when it was sent before.

        Never raises for what an operation can meet: the outcome's reply is then the error and
        nothing was changed. ``request_id`` 0 is not remembered. The reply must not leave before
        ``write_batch``.
        """
        txn = self._txn
        remembered = request_id and opcode in _REMEMBERED
        context = self._context_for(client_id)
        mark = txn.mark()
        try:
            if remembered:
                stored = txn.get(schema.REPLIES, schema.reply_key(client_id, request_id))
                if stored is not None:
                    return Outcome(_decode_reply(stored, opcode, request_id))
            reply = RUN[opcode](txn, request, context)
            if opcode is Opcode.REGISTER_STORAGE:
                self._find_regions()
            if remembered:
                self._remember(client_id, request_id, opcode, reply)
        except CrailError as error:
            self._undo(mark)
            return Outcome(error, (), tuple(context.shown))
        except lmdb.Error as error:
            return Outcome(self._recover(mark, opcode.name, error))
        except Exception:
            log.exception("%s of client %016x: %r", opcode.name, client_id, request)
            self._undo(mark)
            return Outcome(
                InternalError(f"{opcode.name.lower()} failed: the metadata server's log says why")
            )
        return Outcome(reply, tuple(context.invalidations), tuple(context.shown))

    def run(self, function: Callable[[Txn, Context], T], client_id: int = 0) -> T:
        """Run an internal operation with the same undo and journal; raises what it raises."""
        context = self._context_for(client_id)
        mark = self._txn.mark()
        try:
            return function(self._txn, context)
        except lmdb.Error as error:
            raise self._recover(mark, getattr(function, "__name__", "operation"), error) from error
        except BaseException:
            self._undo(mark)
            raise

    def audit(self) -> AuditReply:
        """Check every invariant of ``schema.py`` over all tables.

        DamagedError: a row cannot be read, or is not what was written.
        """
        try:
            return audit.audit(self._txn)
        except lmdb.Error as error:
            # LMDB refuses everything else in a transaction in which a read has failed.
            raise self._recover(self._txn.mark(), "audit", error) from error

    @property
    def next_header_change(self) -> int:
        """One above every sequence in ``header_log``."""
        sequence: int = self._txn.state(b"next_header_change")
        return sequence

    @property
    def header_change_count(self) -> int:
        """How many changes the regions' headers have yet to follow."""
        return self._txn.row_count(schema.HEADER_LOG)

    def free_settled(self) -> None:
        """What left files in durable regions without headers, in changes that are synced by now,
        becomes free."""
        through = self.synced_header_changes - 1
        self.run(lambda txn, _: space.free_cleared(txn, self._settling_regions, through))

    def _find_regions(self) -> None:
        stored = {
            schema.unpack_region(key): schema.decode_region(value).info
            for key, value in self._txn.scan(schema.REGIONS)
        }
        self._header_regions = frozenset(
            region for region, info in stored.items() if info.keeps_headers
        )
        self._settling_regions = frozenset(
            region for region, info in stored.items() if info.durable and not info.keeps_headers
        )

    def _context_for(self, client_id: int) -> Context:
        return Context(
            client_id,
            self._clock_ns(),
            self.block_size_bytes,
            partial(self._holders, client_id),
            self._header_regions,
            self._settling_regions,
            self.synced_header_changes,
        )

    def _holders(self, client_id: int, ino: int) -> frozenset[int]:
        return self.holders(ino, client_id)

    def _remember(self, client_id: int, request_id: int, opcode: Opcode, reply: Record) -> None:
        """A client has at most ``REQUESTS_IN_FLIGHT_MAX`` requests without an answer, and ids
        rise: an answer that many ids back is not asked for again."""
        self._txn.put(
            schema.REPLIES,
            schema.reply_key(client_id, request_id),
            _REPLY_OPCODE.pack(opcode) + schema.encode(reply),
        )
        if request_id > REPLIES_KEPT_PER_CLIENT_MAX:
            oldest = schema.reply_key(client_id, request_id - REPLIES_KEPT_PER_CLIENT_MAX)
            self._txn.delete(schema.REPLIES, oldest)

    # --- durability -----------------------------------------------------------------------------

    def write_batch(self) -> None:
        """Write the changes of everything executed since the last call to the journal.

        OSError: they could be written nowhere. No reply to them may leave and the server must stop;
        the next start finds the state before them.
        """
        changes = self._txn.changes
        if not changes:
            return
        latest = {(change.table, change.key): change.value for change in changes}
        rows = [(table, key, value) for (table, key), value in latest.items()]
        try:
            self._state.journal.append(rows)
        except OSError as error:
            log.warning("the journal cannot be written (%s): trying a checkpoint instead", error)
            self._commit_instead(error)
        self._txn.take_changes()

    def _commit_instead(self, failure: OSError) -> None:
        try:
            self._commit()
        except lmdb.Error as error:
            self._is_stuck = True
            raise OSError(
                failure.errno,
                f"{failure.strerror}: the metadata server cannot go on. What it has acknowledged "
                "is safe; make room there (or look at the device), then start it again",
                str(self._state.path),
            ) from error

    def sync_journal(self) -> None:
        """Wait until all that was written before outlives a power cut. For another thread.

        OSError: the medium failed; the server must stop, since what was written is in doubt.
        """
        self._state.journal.sync()

    @property
    def sync_due(self) -> bool:
        """Whether the journal has records that a power cut could still take."""
        journal = self._state.journal
        return journal.sequence > journal.synced_sequence

    @property
    def checkpoint_due(self) -> bool:
        journal_bytes = self._state.journal.size_bytes
        age_ns = abs(self._clock_ns() - self._last_checkpoint_ns)
        old = age_ns >= CHECKPOINT_INTERVAL_MS * _NANOSECONDS_PER_MILLISECOND
        return journal_bytes >= JOURNAL_CHECKPOINT_BYTES or (old and journal_bytes > 0)

    def checkpoint(self) -> None:
        """Make LMDB's file hold everything and empty the journal.

        A full disk is not an error: the journal stays and grows until a later one succeeds.
        """
        self.write_batch()
        self._last_checkpoint_ns = self._clock_ns()
        try:
            self._commit()
        except lmdb.Error:
            log.exception("checkpoint failed: the journal keeps what it has, will try again")
            self._reload()

    def close(self) -> None:
        """Write everything and leave the state marked as cleanly closed."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._is_stuck:
                self.run(lambda txn, _: txn.set_state(b"clean", True))
                self.checkpoint()
        finally:
            self._txn.abort()
            self._state.close()

    def _commit(self) -> None:
        """Commit LMDB, synced, then empty the journal: a record is forgotten only once it is in a
        state that outlives a power cut."""
        journal = self._state.journal
        self._txn.commit_as(journal.sequence)
        self._txn.attach(self._state.begin())
        journal.reset()

    def _undo(self, mark: int) -> None:
        try:
            self._txn.undo(mark)
        except lmdb.Error as error:
            self._recover(mark, "taking an operation back", error)

    def _recover(self, mark: int, what: str, error: lmdb.Error) -> CrailError:
        """LMDB failed in the operation whose changes begin at ``mark``: drop it, and the open
        transaction with it, since nothing more can be done in that one."""
        log.error("%s: LMDB failed: %s", what, error, exc_info=error)
        self._txn.forget(mark)
        self._reload()
        if isinstance(error, lmdb.MapFullError | lmdb.DiskError):
            return NoSpaceError(f"the metadata server's database cannot grow: {error}")
        return _damaged(error)

    def _reload(self) -> None:
        """Begin anew from LMDB's last commit: the journal, then what is not yet in it."""
        self._txn.abort()
        self._txn.attach(self._state.begin())
        apply_journal(self._state.journal, self._txn)
        self._txn.reapply()


def _damaged(error: lmdb.Error) -> DamagedError:
    return DamagedError(
        f"the metadata server's database is damaged: {error}. Stop the server and restore its "
        "state directory from a backup; 'crail fsck' shows what a restored one holds"
    )


def _decode_reply(stored: bytes, opcode: Opcode, request_id: int) -> Record | CrailError:
    (stored_opcode,) = _REPLY_OPCODE.unpack_from(stored)
    if stored_opcode != opcode:
        return ProtocolError(
            f"request {request_id} was {Opcode(stored_opcode).name} before and is {opcode.name} now"
        )
    reply: Any = _REPLY_DECODERS[opcode].decode(memoryview(stored)[_REPLY_OPCODE.size :])
    assert isinstance(reply, Record)
    return reply
