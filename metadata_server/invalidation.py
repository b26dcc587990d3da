"""Making other clients forget what has changed, before the change is acknowledged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from crailfs.errors import CrailError, UnavailableError
from crailfs.limits import INVALIDATE_MAX
from crailfs.wire.messages import Invalidate, InvalidateReply, Invalidation, Message, Opcode
from metadata_server import orphans, space
from metadata_server.clients import Client
from metadata_server.context import Context
from metadata_server.driver import Driver
from metadata_server.leases import Leases
from metadata_server.txn import Txn

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Change:
    """One operation that some lease holders have not answered for yet."""

    def __init__(
        self, deadline_s: float, sequences: tuple[int, int], on_answered: Callable[[], None]
    ) -> None:
        self.deadline_s = deadline_s
        self.sequences = sequences
        """First and end of what the operation put into ``reclaim``."""
        self.on_answered = on_answered
        self.unanswered: dict[int, int] = {}
        """Client id -> pushes that it has to answer; 0 for one that is away."""


class Invalidator:
    """Pushes invalidations to lease holders and tells when all have answered.

    A holder that does not answer within the lease time is disconnected: a client drops all that it
    remembers when its connection breaks, and by then its leases have run out.
    """

    def __init__(
        self,
        driver: Driver,
        leases: Leases,
        clients: dict[int, Client],
        *,
        lease_s: float,
        clock_s: Callable[[], float],
    ) -> None:
        self._driver = driver
        self._leases = leases
        self._clients = clients
        self._lease_s = lease_s
        self._clock_s = clock_s
        self._changes: dict[_Change, None] = {}
        self._next_reclaim = self._read_next_reclaim()
        self._left_over = self._next_reclaim
        self.push_count = 0
        self.unanswered_count = 0

    @property
    def open_count(self) -> int:
        """Operations that wait for an answer."""
        return len(self._changes)

    def announce(
        self,
        asking_client: int,
        invalidations: Sequence[Invalidation],
        on_answered: Callable[[], None],
    ) -> bool:
        """Tell the other lease holders. True: there are none, all is done; otherwise
        ``on_answered`` is called when each has answered or can no longer trust what it has."""
        holders = self._leases.holders
        entries: dict[int, dict[Invalidation, None]] = {}
        for invalidation in invalidations:
            for client_id in holders(invalidation.ino, asking_client):
                entries.setdefault(client_id, {})[invalidation] = None
        if not entries:
            return True
        first, self._next_reclaim = self._next_reclaim, self._read_next_reclaim()
        now_s = self._clock_s()
        change = _Change(now_s + self._lease_s, (first, self._next_reclaim), on_answered)
        self._changes[change] = None
        for client_id, wanted in entries.items():
            client = self._clients.get(client_id)
            if client is not None and client.peer is not None:
                self._push(client, tuple(wanted), change)
            elif client is not None and not client.forgets_at_once:
                change.unanswered[client_id] = 0
        if not change.unanswered:
            del self._changes[change]
            self._free(change)
            return True
        return False

    def ask_still_open(self, client: Client) -> None:
        """A client is back and may have missed that nodes lost their last name: release those
        orphans that it has not open."""
        held = self._driver.run(lambda txn, _: orphans.held_by(txn, client.id))
        if held:
            change = _Change(self._clock_s() + self._lease_s, (0, 0), lambda: None)
            self._changes[change] = None
            self._push(client, tuple(Invalidation(ino, b"", True) for ino in held), change)

    def run(self, function: Callable[[Txn, Context], T], client_id: int = 0) -> T:
        """``Driver.run``, and announce what it changed."""
        contexts: list[Context] = []

        def operation(txn: Txn, context: Context) -> T:
            contexts.append(context)
            return function(txn, context)

        result = self._driver.run(operation, client_id)
        self.announce(client_id, contexts[0].invalidations, lambda: None)
        return result

    def forgotten_by(self, client_id: int) -> None:
        """The client trusts nothing that it remembers: it has reconnected, or its session ended."""
        for change in [c for c in self._changes if client_id in c.unanswered]:
            self._answered(change, client_id, all_pushes=True)

    def expire(self) -> None:
        """Give up on holders whose leases have run out."""
        now_s = self._clock_s()
        for change in [c for c in self._changes if c.deadline_s <= now_s]:
            for client_id in list(change.unanswered):
                self.unanswered_count += 1
                client = self._clients.get(client_id)
                if client is not None and client.peer is not None:
                    log.warning(
                        "%s did not answer an invalidation within %.1f s: disconnected",
                        client.peer.description,
                        self._lease_s,
                    )
                    client.peer.close("it did not answer an invalidation")
                self._answered(change, client_id, all_pushes=True)

    def free_left_over(self) -> None:
        """No client trusts anything that an earlier run of this server has shown it."""
        self._driver.run(
            lambda txn, context: space.free_reclaimed(txn, context, 0, self._left_over)
        )

    def _push(self, client: Client, entries: tuple[Invalidation, ...], change: _Change) -> None:
        assert client.peer is not None
        for start in range(0, len(entries), INVALIDATE_MAX):
            part = entries[start : start + INVALIDATE_MAX]
            removed = frozenset(entry.ino for entry in part if entry.removed)
            change.unanswered[client.id] = change.unanswered.get(client.id, 0) + 1
            self.push_count += 1
            client.peer.push(
                Opcode.INVALIDATE,
                Invalidate(part),
                partial(self._push_answered, change, client, removed),
            )

    def _push_answered(
        self,
        change: _Change,
        client: Client,
        removed: frozenset[int],
        answer: Message | CrailError,
    ) -> None:
        if isinstance(answer, InvalidateReply):
            for ino in removed.difference(answer.still_open):
                self.run(partial(_release, ino, client.id), client.id)
            self._answered(change, client.id)
        elif isinstance(answer, UnavailableError):
            if client.is_local:
                self._answered(change, client.id, all_pushes=True)
        elif client.peer is not None:
            log.error("%s could not invalidate: %s", client.peer.description, answer)
            client.peer.close("it could not invalidate its caches")

    def _answered(self, change: _Change, client_id: int, *, all_pushes: bool = False) -> None:
        left = change.unanswered.get(client_id, 0) - 1
        if left > 0 and not all_pushes:
            change.unanswered[client_id] = left
            return
        change.unanswered.pop(client_id, None)
        if not change.unanswered and change in self._changes:
            del self._changes[change]
            self._free(change)
            change.on_answered()

    def _free(self, change: _Change) -> None:
        first, end = change.sequences
        if first < end:
            self._driver.run(lambda txn, context: space.free_reclaimed(txn, context, first, end))

    def _read_next_reclaim(self) -> int:
        sequence: int = self._driver.run(lambda txn, _: txn.state(b"next_reclaim"))
        return sequence


def _release(ino: int, client_id: int, txn: Txn, context: Context) -> None:
    orphans.release(txn, context, ino, client_id)
