"""Requests to the metadata server: who may ask what, and when the answer leaves."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from crailfs.errors import (
    CrailError,
    FencedError,
    InvalidError,
    NotPermittedError,
    NotSupportedError,
    TryAgainError,
)
from crailfs.limits import LEASE_MS, RENEW_MAX, SESSION_TIMEOUT_MS, STORAGE_TIMEOUT_MS
from crailfs.net.server import Peer
from crailfs.records import Record
from crailfs.wire.messages import (
    OPERATIONS,
    ClusterMap,
    CommitFile,
    Empty,
    GetClusterMap,
    GetExtents,
    GetStatistics,
    HeartbeatReply,
    KeepAlive,
    KeepAliveReply,
    Message,
    NextMoves,
    Opcode,
    RegisterStorage,
    Role,
    SetXattr,
    Status,
    StorageHeartbeat,
    Welcome,
)
from metadata_server import region_use, sessions
from metadata_server.clients import Client
from metadata_server.context import Context
from metadata_server.driver import Driver
from metadata_server.expiry import Expiry
from metadata_server.heat import Heat
from metadata_server.invalidation import Invalidator
from metadata_server.last_use import note_use
from metadata_server.leases import Leases
from metadata_server.membership import Membership
from metadata_server.moves import Planner
from metadata_server.ops import RUN, get_cluster_map, get_statistics
from metadata_server.ops._xattrs import TTL_XATTR
from metadata_server.txn import Txn

log = logging.getLogger(__name__)


class Timings(NamedTuple):
    """What the server measures time by, in milliseconds; tests shorten it."""

    lease_ms: int = LEASE_MS
    session_timeout_ms: int = SESSION_TIMEOUT_MS
    storage_timeout_ms: int = STORAGE_TIMEOUT_MS


DEFAULT_TIMINGS = Timings()

_STORAGE_OPERATIONS = frozenset(
    {
        Opcode.REGISTER_STORAGE,
        Opcode.STORAGE_HEARTBEAT,
        Opcode.FETCH_HEADER_CHANGES,
        Opcode.NEXT_MOVES,
    }
)
_SALVAGE = frozenset({Opcode.BEGIN_SALVAGE, Opcode.SALVAGE_FILE, Opcode.END_SALVAGE})
_INFORMATION = frozenset({Opcode.GET_CLUSTER_MAP, Opcode.GET_STATUS, Opcode.AUDIT})
_SESSION = frozenset({Opcode.KEEP_ALIVE, Opcode.END_SESSION})
_OWN = _SESSION | {Opcode.SYNC_METADATA, Opcode.GET_STATUS, Opcode.AUDIT, Opcode.NEXT_MOVES}
OPERATIONS_SERVED = frozenset(RUN) | _OWN
_MUTATING = frozenset(opcode for opcode in OPERATIONS_SERVED if OPERATIONS[opcode].mutates)
_PERMITTED = {
    Role.CLIENT: OPERATIONS_SERVED - _STORAGE_OPERATIONS - _SALVAGE,
    Role.STORAGE_SERVER: _STORAGE_OPERATIONS | _INFORMATION,
    Role.OPERATOR: (OPERATIONS_SERVED - _MUTATING - _SESSION) | _SALVAGE,
    Role.METADATA_SERVER: frozenset[Opcode](),
}
_HARMLESS = frozenset({Opcode.GRANT_BLOCKS, Opcode.RETURN_BLOCKS})
"""Changes that no client can have cached."""


HELD_UP_S = 2.0
"""Between two ticks."""


class WaterMarks(NamedTuple):
    """See ``MetadataConfig.tier_high_water`` and ``tier_low_water``."""

    high: float = 0.9
    low: float = 0.8


DEFAULT_WATER_MARKS = WaterMarks()


class _Answer(NamedTuple):
    peer: Peer
    request_id: int
    reply: Record | CrailError


class _Deferred(NamedTuple):
    peer: Peer
    opcode: Opcode
    request_id: int
    request: Message


@dataclass(slots=True, eq=False)
class _Pending:
    """A change that is made and must not be acknowledged yet."""

    client_id: int
    request_id: int
    peer: Peer
    reply: Record | CrailError
    is_durable: bool
    """Whether the reply promises that a power cut leaves the change."""


class MetadataHandler:
    """A ``crailfs.net.server.Handler`` over a driver.

    Where there is nothing to be waited for, a reply leaves at the end of its batch; else it stays
    in ``_pending`` until other clients have forgotten what changed and, if it is to be durable, the
    journal is synced. A request that is sent again meanwhile, over a new connection, gets that same
    reply.
    """

    def __init__(
        self,
        driver: Driver,
        timings: Timings = DEFAULT_TIMINGS,
        clock_s: Callable[[], float] = time.monotonic,
        water_marks: WaterMarks = DEFAULT_WATER_MARKS,
    ) -> None:
        self._driver = driver
        self._timings = timings
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._rotated_s = self._ticked_s = clock_s()
        self._leases = Leases()
        driver.holders = self._leases.holders
        self._clients: dict[int, Client] = {}
        self._invalidator = Invalidator(
            driver,
            self._leases,
            self._clients,
            lease_s=timings.lease_ms / 1000,
            clock_s=clock_s,
        )
        self._membership = Membership(
            driver, timeout_s=timings.storage_timeout_ms / 1000, clock_s=clock_s
        )
        self._heat = Heat(clock_s)
        self._planner = Planner(self._heat, water_marks.high, water_marks.low)
        self._expiry = Expiry(
            self._invalidator.run, (timings.session_timeout_ms + timings.lease_ms) / 1000
        )
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._answers: list[_Answer] = []
        """They leave at the end of the batch, when the journal has everything."""
        self._returned: list[Client] = []
        """To be asked at the end of the batch which of its orphans it has open."""
        self._sync_waiters: list[Callable[[], None]] = []
        self.sync_wanted: Callable[[], None] = lambda: None
        """Called when somebody begins to wait for the journal's next sync."""
        self._counters: Counter[str] = Counter()
        self._requests = dict.fromkeys(OPERATIONS_SERVED, 0)
        self._own: dict[Opcode, Callable[[Peer, int, Any], None]] = {
            Opcode.KEEP_ALIVE: self._keep_alive,
            Opcode.END_SESSION: self._client_ends,
            Opcode.SYNC_METADATA: self._sync_metadata,
            Opcode.GET_STATUS: self._get_status,
            Opcode.AUDIT: self._audit,
            Opcode.GET_CLUSTER_MAP: self._get_cluster_map,
            Opcode.REGISTER_STORAGE: self._storage,
            Opcode.STORAGE_HEARTBEAT: self._storage,
            Opcode.FETCH_HEADER_CHANGES: self._fetch_header_changes,
            Opcode.NEXT_MOVES: self._next_moves,
            **{opcode: partial(self._salvage, opcode) for opcode in _SALVAGE},
        }
        self._missing: set[int] = set()
        """Clients of before an unclean end that have not come back: they may trust what they
        cached, and this server does not know what that is."""
        self._deferred: deque[_Deferred] = deque()
        """Changes that wait until ``_missing`` is empty or all old leases have run out."""
        self._has_left_over = True
        """Whether blocks wait in ``reclaim`` for answers that an earlier run asked for."""
        self._recall_clients()

    # --- connections ----------------------------------------------------------------------------

    def welcome(self, peer: Peer) -> Welcome:
        is_new = False
        if peer.role is Role.CLIENT:
            is_new = self._welcome_client(peer)
        elif peer.role is Role.METADATA_SERVER:
            raise NotPermittedError("this metadata server has no peers")
        return Welcome(session_is_new=is_new, lease_ms=self._timings.lease_ms)

    def _welcome_client(self, peer: Peer) -> bool:
        if peer.client_id == 0:
            raise NotPermittedError("a client's id must not be 0")
        client = self._clients.get(peer.client_id)
        if client is None:
            client = self._clients[peer.client_id] = Client(peer.client_id)
        elif client.peer is not None:
            client.peer.close("the same client has connected again")
        client.peer = peer
        client.is_local = peer.is_local
        client.was_active = True
        is_new = self._driver.run(
            lambda txn, _: sessions.open_session(txn, peer.client_id, peer.description)
        )
        if not is_new:
            self._invalidator.forgotten_by(client.id)
            self._returned.append(client)
        self._missing.discard(client.id)
        return is_new

    def disconnected(self, peer: Peer) -> None:
        client = self._clients.get(peer.client_id)
        if client is not None and client.peer is peer:
            client.peer = None
            client.heard_s = self._clock_s()
            client.was_active = False
        self._deferred = deque(d for d in self._deferred if d.peer is not peer)

    def payload_target(
        self, peer: Peer, opcode: Opcode, request: Message, byte_count: int
    ) -> memoryview:
        raise NotSupportedError("a metadata server takes no payload")

    # --- requests -------------------------------------------------------------------------------

    def request(
        self,
        peer: Peer,
        opcode: Opcode,
        request_id: int,
        request: Message,
        payload: memoryview | None,
    ) -> None:
        if opcode not in _PERMITTED[peer.role]:
            raise NotPermittedError(f"{opcode.name} is not for {peer.description}")
        self._requests[opcode] += 1
        client_id = 0
        if peer.role is Role.CLIENT:
            client_id = peer.client_id
            client = self._clients.get(client_id)
            if client is None or client.peer is not peer:
                raise FencedError(f"the session of client {client_id:016x} has ended")
            client.was_active = True
        own = self._own.get(opcode)
        if own is not None:
            own(peer, request_id, request)
        elif opcode in _MUTATING:
            self._change(peer, opcode, request_id, request)
        else:
            reply, _, shown = self._driver.execute(client_id, request_id, opcode, request)
            if client_id:
                self._leases.show(client_id, shown)
            if isinstance(request, GetExtents) and not isinstance(reply, CrailError):
                self._heat.use(request.ino)
            self._answers.append(_Answer(peer, request_id, reply))

    def _change(self, peer: Peer, opcode: Opcode, request_id: int, request: Message) -> None:
        client_id = peer.client_id
        pending = self._pending.get((client_id, request_id))
        if pending is not None:
            pending.peer = peer
            return
        if self._missing and opcode not in _HARMLESS:
            self._deferred.append(_Deferred(peer, opcode, request_id, request))
            return
        outcome = self._driver.execute(client_id, request_id, opcode, request)
        self._leases.show(client_id, outcome.shown)
        if isinstance(outcome.reply, TryAgainError):
            # Blocks that files no longer have come back once that outlives a power cut.
            self.sync_wanted()
        if isinstance(request, CommitFile) and not isinstance(outcome.reply, CrailError):
            self._heat.use(request.ino)
        elif isinstance(request, SetXattr) and request.name == TTL_XATTR:
            self._expiry.wake()
        is_durable = isinstance(request, CommitFile) and request.durable
        pending = _Pending(client_id, request_id, peer, outcome.reply, is_durable)
        nobody_asked = not outcome.invalidations or self._invalidator.announce(
            client_id, outcome.invalidations, partial(self._forgotten, pending)
        )
        if nobody_asked and not is_durable:
            self._answers.append(_Answer(peer, request_id, outcome.reply))
            return
        self._counters["replies_withheld"] += 1
        self._pending[client_id, request_id] = pending
        if nobody_asked:
            self._forgotten(pending)

    def _forgotten(self, pending: _Pending) -> None:
        """No other client trusts what the change has made untrue."""
        if pending.is_durable and not isinstance(pending.reply, CrailError):
            self._when_synced(partial(self._release, pending))
        else:
            self._release(pending)

    def _release(self, pending: _Pending) -> None:
        del self._pending[pending.client_id, pending.request_id]
        self._answers.append(_Answer(pending.peer, pending.request_id, pending.reply))

    def batch_done(self) -> None:
        """Put everything into the journal, and only then hand out the replies."""
        if self._deferred and not self._missing:
            deferred, self._deferred = self._deferred, deque()
            for peer, opcode, request_id, request in deferred:
                self._change(peer, opcode, request_id, request)
        if self._returned and not self._missing:
            self._ask_returned()
        self._driver.write_batch()
        self._counters["batches"] += 1
        answers, self._answers = self._answers, []
        for peer, request_id, reply in answers:
            try:
                if isinstance(reply, CrailError):
                    peer.reply_error(request_id, reply)
                else:
                    peer.reply(request_id, reply)
            except InvalidError as error:
                peer.reply_error(request_id, error)

    def _ask_returned(self) -> None:
        """Clients that were away may have missed that a node lost its last name."""
        returned, self._returned = self._returned, []
        for client in returned:
            if client.peer is not None:
                self._invalidator.ask_still_open(client)

    # --- the server's own operations ------------------------------------------------------------

    def _keep_alive(self, peer: Peer, request_id: int, request: KeepAlive) -> None:
        if len(request.renew) > RENEW_MAX:
            raise InvalidError(f"{len(request.renew)} leases at once: at most {RENEW_MAX}")
        client_id = peer.client_id

        def operation(txn: Txn, context: Context) -> tuple[int, ...]:
            sessions.forget_replies(txn, client_id, request.completed_below)
            gone = []
            for ino in request.renew:
                node = txn.find_node(ino)
                if node is None:
                    gone.append(ino)
                else:
                    note_use(txn, context, node)
            return tuple(gone)

        gone = self._driver.run(operation, client_id)
        renewed = set(request.renew).difference(gone)
        self._leases.show(client_id, renewed)
        for ino in renewed:
            self._heat.use(ino)
        self._answers.append(_Answer(peer, request_id, KeepAliveReply(gone)))

    def _client_ends(self, peer: Peer, request_id: int, request: Message) -> None:
        self._end_session(self._clients[peer.client_id])
        self._answers.append(_Answer(peer, request_id, Empty()))

    def _sync_metadata(self, peer: Peer, request_id: int, request: Message) -> None:
        answer = _Answer(peer, request_id, Empty())
        self._when_synced(lambda: self._answers.append(answer))

    def _storage(self, peer: Peer, request_id: int, request: Message) -> None:
        is_register = isinstance(request, RegisterStorage)
        opcode = Opcode.REGISTER_STORAGE if is_register else Opcode.STORAGE_HEARTBEAT
        # Both may be repeated at will, so no reply is kept for a repetition.
        reply = self._driver.execute(0, 0, opcode, request).reply
        if isinstance(request, RegisterStorage):
            if not isinstance(reply, CrailError):
                self._membership.heard(request.server.id)
                self._counters["storage_registrations"] += 1
        elif isinstance(request, StorageHeartbeat):
            if isinstance(reply, HeartbeatReply) and reply.known:
                self._membership.heard(request.server_id)
            self._counters["fences"] += len(request.fenced)
        self._answers.append(_Answer(peer, request_id, reply))

    def _fetch_header_changes(self, peer: Peer, request_id: int, request: Message) -> None:
        # What it acknowledges can be acknowledged again, so no reply is kept for a repetition.
        reply = self._driver.execute(0, 0, Opcode.FETCH_HEADER_CHANGES, request).reply
        self._answers.append(_Answer(peer, request_id, reply))

    def _salvage(self, opcode: Opcode, peer: Peer, request_id: int, request: Message) -> None:
        """Each may be repeated and leads to the same. The operator, who has no session, is
        answered at once: clients only learn of new files."""
        outcome = self._driver.execute(0, 0, opcode, request)
        self._invalidator.announce(0, outcome.invalidations, lambda: None)
        self._answers.append(_Answer(peer, request_id, outcome.reply))

    def _get_cluster_map(self, peer: Peer, request_id: int, request: Message) -> None:
        self._answers.append(_Answer(peer, request_id, self._cluster_map()))

    def _cluster_map(self) -> ClusterMap:
        cluster = self._driver.run(
            lambda txn, context: get_cluster_map.run(txn, GetClusterMap(), context)
        )
        return self._membership.with_silence(cluster)

    def _get_status(self, peer: Peer, request_id: int, request: Message) -> None:
        statistics = self._driver.run(
            lambda txn, context: get_statistics.run(txn, GetStatistics(), context)
        )
        reply = Status(
            cluster=self._cluster_map(),
            statistics=statistics,
            session_count=len(self._clients),
            epoch=self._driver.epoch,
            uptime_seconds=self._clock_s() - self._started_s,
            counters=self.counters(),
            regions=self._driver.run(lambda txn, _: region_use.of_regions(txn)),
        )
        self._answers.append(_Answer(peer, request_id, reply))

    def _next_moves(self, peer: Peer, request_id: int, request: NextMoves) -> None:
        moves = self._driver.run(
            lambda txn, context: self._planner.next_moves(txn, request, context)
        )
        self._answers.append(_Answer(peer, request_id, moves))

    def _audit(self, peer: Peer, request_id: int, request: Message) -> None:
        self._answers.append(_Answer(peer, request_id, self._driver.audit()))

    def counters(self) -> dict[str, int]:
        """What has happened since the start, and what is waiting now."""
        requests = {
            f"requests_{opcode.name.lower()}": count
            for opcode, count in self._requests.items()
            if count
        }
        return {
            **requests,
            **self._counters,
            "invalidations": self._invalidator.push_count,
            "invalidations_unanswered": self._invalidator.unanswered_count,
            "leased_inodes": self._leases.inode_count,
            "replies_waiting": len(self._pending),
            "changes_deferred": len(self._deferred),
            "nodes_expired": self._expiry.removed_count,
            "header_changes_waiting": self._driver.header_change_count,
        }

    # --- durability -----------------------------------------------------------------------------

    def _when_synced(self, then: Callable[[], None]) -> None:
        self._sync_waiters.append(then)
        self.sync_wanted()

    def take_sync_waiters(self) -> list[Callable[[], None]]:
        """Who waits for all that is in the journal now to be synced; to be called then."""
        waiters, self._sync_waiters = self._sync_waiters, []
        return waiters

    # --- time -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let leases, sessions and storage servers expire; to be called a few times in the
        shortest of the ``Timings``."""
        now_s = self._clock_s()
        if now_s - self._ticked_s > HELD_UP_S:
            self._excuse_silence(now_s - self._ticked_s)
        self._ticked_s = now_s
        lease_s = self._timings.lease_ms / 1000
        if self._missing and now_s - self._started_s >= lease_s:
            log.info("%d clients have not come back; going on without them", len(self._missing))
            self._missing.clear()
        if self._has_left_over and not self._missing:
            self._has_left_over = False
            self._invalidator.free_left_over()
        if now_s - self._rotated_s >= lease_s:
            self._rotated_s = now_s
            self._leases.rotate()
        self._invalidator.expire()
        self._expire_sessions(now_s)
        self._membership.expire()
        self.batch_done()

    def expire_nodes(self) -> bool:
        """Remove some of the nodes whose time to live is over. True: there is more to do now."""
        if self._missing:
            return False
        more = self._expiry.step()
        self.batch_done()
        return more

    def _excuse_silence(self, held_up_s: float) -> None:
        """This process itself did not run: what came meanwhile is yet to be read."""
        log.warning("this server was held up for %.1f s: nobody's silence counts", held_up_s)
        for client in self._clients.values():
            client.was_active = True
        self._membership.excuse_silence()

    def _recall_clients(self) -> None:
        """Sessions outlive a restart of this server."""
        now_s = self._clock_s()
        for client_id in self._driver.run(lambda txn, _: sessions.live_clients(txn)):
            self._clients[client_id] = Client(client_id, heard_s=now_s)
        if not self._driver.was_clean:
            self._missing.update(self._clients)

    def _expire_sessions(self, now_s: float) -> None:
        timeout_s = self._timings.session_timeout_ms / 1000
        for client in list(self._clients.values()):
            if client.was_active:
                client.was_active = False
                client.heard_s = now_s
            elif now_s - client.heard_s > timeout_s:
                silent_s = now_s - client.heard_s
                log.warning(
                    "client %016x has been silent for %.1f s: its session has ended",
                    client.id,
                    silent_s,
                )
                self._counters["sessions_expired"] += 1
                self._end_session(client)
                if client.peer is not None:
                    client.peer.close("it was silent for too long: its session has ended")

    def _end_session(self, client: Client) -> None:
        """Take back what the client holds; it hears nothing of it."""
        self._invalidator.run(
            lambda txn, context: sessions.expire(txn, context, client.id), client.id
        )
        del self._clients[client.id]
        self._missing.discard(client.id)
        self._leases.end(client.id)
        self._invalidator.forgotten_by(client.id)
