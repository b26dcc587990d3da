"""Time to live: nodes that nobody has used for their ``ttl_s`` are removed, a few at a time.

A node is used when it is changed, when its map is asked for and as long as a client has it open.
That a node with a time to live was read is noted in its ``atime``, late by up to an eighth of the
time to live, so that it outlives a restart: nothing goes sooner than asked for, and what was read
goes up to an eighth later.

A cursor goes round the table of entries, which alone leads from a node to its names. Between two
rounds it rests until the first node that it saw, or one made since, can be due.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

from crailfs.records import Attributes
from crailfs.units import NANOSECONDS_PER_SECOND, ROOT_INODE
from crailfs.wire.messages import RemoveNode
from metadata_server import schema
from metadata_server.context import Context
from metadata_server.last_use import due_ns
from metadata_server.ops import remove_node
from metadata_server.txn import Txn

ROWS_MAX: Final = 256
"""Entries that one step looks at, and removals that it makes: about 3 ms each."""
REMOVALS_MAX: Final = 32
REST_MAX_S: Final = 3_600.0
"""An entry that was renamed to where the cursor had been already is found by then."""

_REST_MAX_NS: Final = int(REST_MAX_S * NANOSECONDS_PER_SECOND)
_NEVER: Final = 1 << 63
_INO_BYTES: Final = 8
T = TypeVar("T")


class Run(Protocol):
    """``Invalidator.run``: an operation whose changes are announced to those who cached them."""

    def __call__(self, function: Callable[[Txn, Context], T]) -> T: ...


class _Due(NamedTuple):
    key: bytes
    """In ``entries``."""
    node: Attributes


class _Window(NamedTuple):
    """What one step has seen."""

    due: list[_Due]
    next_key: bytes
    """Where the next step begins; empty: the round is over."""
    next_due_ns: int
    """The earliest time of a node that is not due, or of one that is made from now on."""


class Expiry:
    """``idle_min_s``: a node that was used this recently may still be open at a client that cannot
    say so at present, and stays whatever its time to live is."""

    def __init__(self, run: Run, idle_min_s: float) -> None:
        self._run = run
        self._idle_min_ns = int(idle_min_s * NANOSECONDS_PER_SECOND)
        self._next_key = b""
        self._next_due_ns = _NEVER
        """As in ``_Window``, of this round so far."""
        self._rests_until_ns = 0
        self.removed_count = 0

    def wake(self) -> None:
        """A time to live was set: where the round has been already, something may be due sooner
        than it knows. It still comes to its end, however often that happens, and goes on at once
        with the next one."""
        if self._next_key:
            self._next_due_ns = 0
        else:
            self._rests_until_ns = 0

    def step(self) -> bool:
        """Look at some entries and remove what is due. True: there is more to do now."""
        window = self._run(self._look)
        if window is None:
            return False
        for key, node in window.due[:REMOVALS_MAX]:
            self._run(partial(_remove, key, node))
            self.removed_count += 1
        self._next_due_ns = min(self._next_due_ns, window.next_due_ns)
        if len(window.due) > REMOVALS_MAX:
            self._next_key = window.due[REMOVALS_MAX].key
        else:
            self._next_key = window.next_key
        if not self._next_key:
            self._rests_until_ns, self._next_due_ns = self._next_due_ns, _NEVER
        return bool(self._next_key)

    def _look(self, txn: Txn, context: Context) -> _Window | None:
        if not self._next_key and context.now_ns < self._rests_until_ns:
            return None
        due: list[_Due] = []
        times = [context.now_ns + _REST_MAX_NS]
        if not self._next_key:
            self._note_made_later(times, txn.node(ROOT_INODE), context.now_ns)
        next_key = b""
        for row_count, (key, value) in enumerate(txn.scan(schema.ENTRIES, self._next_key)):
            if row_count == ROWS_MAX:
                next_key = key
                break
            node = txn.find_node(schema.unpack_u64(value))
            if node is None or not node.placement.ttl_s:
                continue
            self._note_made_later(times, node, context.now_ns)
            if node.is_directory and (node.size or node.placement.ttl_is_own):
                continue
            node_due_ns = due_ns(node, self._idle_min_ns)
            if node_due_ns <= context.now_ns:
                due.append(_Due(key, node))
            else:
                times.append(node_due_ns)
        return _Window(due, next_key, min(times))

    def _note_made_later(self, times: list[int], node: Attributes, now_ns: int) -> None:
        """What comes into this directory from now on, or is left empty, is due after its time."""
        ttl_ns = node.placement.ttl_s * NANOSECONDS_PER_SECOND
        if node.is_directory and ttl_ns:
            times.append(now_ns + max(self._idle_min_ns, ttl_ns))


def _remove(key: bytes, node: Attributes, txn: Txn, context: Context) -> None:
    parent, name = schema.unpack_u64(key[:_INO_BYTES]), key[_INO_BYTES:]
    request = RemoveNode(parent, name, directory=node.is_directory, not_open=node.ino)
    remove_node.run(txn, request, context)
