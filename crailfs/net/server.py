"""The accepting side of all RPC: many connections, one trio task, requests handled in batches.

All connections are non-blocking and in one epoll set. Whatever has arrived is read and handed to
the ``Handler``, then ``batch_done`` is called (a group commit goes there), then all replies are
sent. While traffic is hot and every request is answered at once, the task polls on instead of
going through trio's scheduler, which costs more than a small request.

What a peer can make this process hold is bounded: see ``Connection`` for input; of output one
reply more than ``OUTGOING_PAUSE_BYTES``, because a peer that does not take its replies is not read
from. A peer that stalls in mid-handshake, mid-frame or mid-reply is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

import trio

from crailfs.config import Credentials
from crailfs.errors import (
    CrailError,
    InternalError,
    NotSupportedError,
    ProtocolError,
    VersionError,
)
from crailfs.limits import (
    CONNECTIONS_MAX,
    FRAME_TIMEOUT_MS,
    HANDSHAKE_TIMEOUT_MS,
    UNAUTHENTICATED_CONNECTIONS_MAX,
)
from crailfs.net.address import Listener, TcpAddress, UnixAddress, listen, parse_address, tune
from crailfs.net.peer import AwaitedPayload, Handler, Peer
from crailfs.net.ratelimit import LimitedLog
from crailfs.net.waiting import Spinner
from crailfs.wire.codec import decode_request, error_frame, opcode_of, reply_frame
from crailfs.wire.connection import NEED_DATA, PAYLOAD_RECEIVED, RECEIVE_BYTES, Frame
from crailfs.wire.handshake import AcceptingSide, check_credentials
from crailfs.wire.header import PUSH, REPLY
from crailfs.wire.messages import OPERATIONS, Hello, Message, Opcode, Proof, Welcome

__all__ = ["Handler", "Peer", "serve"]

log = logging.getLogger(__name__)

CHECKPOINT_INTERVAL_S: Final = 0.002
"""How long a busy server keeps trio's other tasks waiting."""
DEADLINE_CHECK_S: Final = 0.25
ACCEPTS_PER_BATCH: Final = 64
_UCRED: Final = struct.Struct("3i")
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


async def serve(
    addresses: Sequence[str],
    handler: Handler,
    credentials: Credentials,
    *,
    epoch: Callable[[], int] | int,
    operations: frozenset[Opcode],
    unix_mode: int = 0o600,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; started with the bound addresses, in order.

    ``operations`` are those that ``handler`` answers; others get ``NotSupportedError``.
    ``unix_mode`` is the permission of Unix socket files. Raises ``ConfigurationError``,
    ``BusyError`` or ``UnavailableError`` if it cannot start, and whatever the handler's
    ``batch_done``, ``disconnected`` or push callbacks raise: such a server must not go on.
    """
    check_credentials(credentials, cluster_id_required=True)
    listeners: list[Listener] = []
    server: _Server | None = None
    try:
        for text in addresses:
            listeners.append(listen(parse_address(text), unix_mode=unix_mode))
        server = _Server(listeners, handler, credentials, epoch, operations)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.enforce_deadlines)
            task_status.started([str(listener.address) for listener in listeners])
            await server.run()
    finally:
        if server is not None:
            server.close()
        for listener in listeners:
            listener.close()


class _Server:
    def __init__(
        self,
        listeners: Sequence[Listener],
        handler: Handler,
        credentials: Credentials,
        epoch: Callable[[], int] | int,
        operations: frozenset[Opcode],
    ) -> None:
        self._handler = handler
        self._credentials = credentials
        self._epoch = epoch
        self._operations = operations
        self._faults = LimitedLog(log)
        self._scratch = memoryview(bytearray(RECEIVE_BYTES))
        self._peers: dict[int, Peer] = {}
        """By descriptor."""
        self._strangers: dict[Peer, None] = {}
        """Peers that are not authenticated yet, oldest first."""
        self._dirty: dict[Peer, None] = {}
        """Peers to be sent to at the end of the batch."""
        self._doomed: dict[Peer, str] = {}
        """Peers to be removed at the end of the batch, and why."""
        self._open_request_count = 0
        self._in_batch = False
        self._epoll = select.epoll()
        self._listeners = {listener.sock.fileno(): listener for listener in listeners}
        self._accepting = True
        for fd in self._listeners:
            self._epoll.register(fd, select.EPOLLIN)

    # --- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        spinner = Spinner(self._epoll.fileno())
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            checkpoint_s = time.monotonic() + CHECKPOINT_INTERVAL_S
            while events := self._epoll.poll(0):
                self._run_batch(events)
                if time.monotonic() >= checkpoint_s:
                    await trio.lowlevel.checkpoint()
                    checkpoint_s = time.monotonic() + CHECKPOINT_INTERVAL_S
                # A request that is still open is being answered by another task: let it run.
                if self._open_request_count == 0:
                    spinner.wait()

    def _run_batch(self, events: Sequence[tuple[int, int]]) -> None:
        self._in_batch = True
        for fd, mask in events:
            listener = self._listeners.get(fd)
            if listener is not None:
                self._accept(listener)
                continue
            peer = self._peers.get(fd)
            if peer is not None and peer not in self._doomed:
                self._serve_peer(peer, mask)
        self._remove_doomed()
        self._handler.batch_done()
        while self._dirty:
            for peer in list(self._dirty):
                self._flush(peer)
            self._dirty.clear()
            if self._doomed:
                # Their removal may have made the handler answer others.
                self._remove_doomed()
                self._handler.batch_done()
        self._in_batch = False

    def _serve_peer(self, peer: Peer, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._flush(peer)
                if peer.paused and not peer.saturated:
                    self._take_frames(peer)
            if mask & ~select.EPOLLOUT and (not peer.saturated or mask & select.EPOLLHUP):
                self._receive(peer)
        except (ProtocolError, VersionError) as error:
            self._refuse(peer, error, is_fault=True)

    async def enforce_deadlines(self) -> None:
        """Cuts off who stalls in mid-handshake, mid-frame or mid-reply."""
        while True:
            await trio.sleep(DEADLINE_CHECK_S)
            now = time.monotonic()
            for peer in self._peers.values():
                reason = self._overdue(peer, now)
                if reason is not None:
                    self._faults.warning("%s: closed: %s", peer.description, reason)
                    self._doomed[peer] = reason
            if not self._accepting:
                self._accepting = True
                for fd in self._listeners:
                    self._epoll.modify(fd, select.EPOLLIN)
            if self._doomed:
                self._run_batch(())

    @staticmethod
    def _overdue(peer: Peer, now: float) -> str | None:
        frame_timeout_s = FRAME_TIMEOUT_MS / 1000
        if peer.handshake is not None and now - peer.connected_s > HANDSHAKE_TIMEOUT_MS / 1000:
            return f"no complete handshake within {HANDSHAKE_TIMEOUT_MS} ms"
        if peer.frame_started_s is not None and now - peer.frame_started_s > frame_timeout_s:
            return f"a frame was not complete within {FRAME_TIMEOUT_MS} ms"
        if peer.send_stalled_s is not None and now - peer.send_stalled_s > frame_timeout_s:
            return f"it took none of its replies within {FRAME_TIMEOUT_MS} ms"
        return None

    # --- connections ----------------------------------------------------------------------------

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPTS_PER_BATCH):
            try:
                sock, place = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    self._faults.warning("cannot accept on %s: %s", listener.address, error)
                    self._make_room()
                    self._pause_accepting()
                    return
                continue  # the peer gave up before it was accepted
            if len(self._strangers) >= UNAUTHENTICATED_CONNECTIONS_MAX:
                self._make_room()
            elif len(self._peers) >= CONNECTIONS_MAX and not self._make_room():
                self._faults.warning("%s refused: %d connections", place, len(self._peers))
                sock.close()
                continue
            self._add_peer(listener, sock, place)

    def _add_peer(self, listener: Listener, sock: socket.socket, place: object) -> None:
        tune(sock)
        is_local = isinstance(listener.address, UnixAddress)
        epoch = self._epoch if isinstance(self._epoch, int) else self._epoch()
        peer = Peer(
            self,
            sock,
            AcceptingSide(self._credentials, epoch),
            is_local=is_local,
            description=_describe(sock, place, is_local=is_local),
        )
        self._peers[sock.fileno()] = peer
        self._strangers[peer] = None
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        peer.epoll_mask = select.EPOLLIN

    def _make_room(self) -> bool:
        """Drops the connection that has been silent in its handshake for longest."""
        oldest = next(iter(self._strangers), None)
        if oldest is None:
            return False
        self._faults.warning("%s: closed: no handshake yet, and others wait", oldest.description)
        self._remove(oldest, "no handshake, and others wait")
        return True

    def _pause_accepting(self) -> None:
        """Until the next check of deadlines: a listener that cannot be served stays readable."""
        self._accepting = False
        for fd in self._listeners:
            self._epoll.modify(fd, 0)

    def _refuse(self, peer: Peer, error: CrailError, *, is_fault: bool) -> None:
        """Ends a connection; a stranger is told why, as far as its socket takes it."""
        if is_fault:
            self._faults.warning("%s: closed: %s", peer.description, error.message)
        if peer.handshake is not None:
            peer.queue.append(error_frame(0, error))
        peer.close(error.message)

    def _remove_doomed(self) -> None:
        while self._doomed:
            peer, reason = self._doomed.popitem()
            self._remove(peer, reason)

    def _remove(self, peer: Peer, reason: str) -> None:
        fd = peer.sock.fileno()
        del self._peers[fd]
        self._epoll.unregister(fd)
        self._doomed.pop(peer, None)
        self._dirty.pop(peer, None)
        peer.closing = peer.closing or reason
        peer.let_go()
        self._open_request_count -= len(peer.in_flight)
        if peer in self._strangers:
            del self._strangers[peer]
        else:
            log.debug("%s: ended: %s", peer.description, reason)
            peer.fail_pushes(reason)
            self._handler.disconnected(peer)

    def close(self) -> None:
        self._in_batch = True  # nothing more is sent
        for peer in list(self._peers.values()):
            self._remove(peer, "this server is stopping")
        self._epoll.close()

    # --- receiving ------------------------------------------------------------------------------

    def _receive(self, peer: Peer) -> None:
        if peer.closing is not None:
            self._doomed[peer] = peer.closing
            return
        connection = peer.connection
        space = connection.payload_space()
        try:
            if space is not None:
                byte_count = peer.sock.recv_into(space)
            else:
                scratch = self._scratch[: connection.receive_max_bytes]
                byte_count = peer.sock.recv_into(scratch)
        except BlockingIOError:
            return
        except OSError as error:
            self._doomed[peer] = str(error)
            return
        if byte_count == 0:
            self._end_of_stream(peer)
            return
        if space is not None:
            connection.payload_written(byte_count)
        else:
            connection.receive_data(scratch[:byte_count])
        self._take_frames(peer)

    def _end_of_stream(self, peer: Peer) -> None:
        reason = "the peer closed the connection"
        if peer.connection.mid_frame and not peer.paused:
            reason = "the peer closed the connection in mid-frame"
            self._faults.warning("%s: %s", peer.description, reason)
        self._doomed[peer] = reason

    def _take_frames(self, peer: Peer) -> None:
        connection = peer.connection
        peer.paused = False
        while peer.closing is None:
            if peer.saturated:
                peer.paused = True
                break
            event = connection.next_event()
            if event is NEED_DATA:
                break
            if event is PAYLOAD_RECEIVED:
                self._payload_received(peer)
            elif peer.handshake is not None:
                self._handshake_frame(peer, peer.handshake, event)
            else:
                self._frame(peer, event)
        if peer.paused or not connection.mid_frame:
            peer.frame_started_s = None
        elif peer.frame_started_s is None or peer.frames_seen != connection.frames_completed:
            peer.frame_started_s = time.monotonic()
        peer.frames_seen = connection.frames_completed
        if peer.paused:
            self._dirty[peer] = None

    def _handshake_frame(self, peer: Peer, handshake: AcceptingSide, frame: Frame) -> None:
        try:
            opcode = opcode_of(frame.code)
            if frame.flags or opcode not in (Opcode.HELLO, Opcode.PROOF):
                raise ProtocolError("the connection did not begin with a handshake")
            request = decode_request(opcode, frame.body)
            if isinstance(request, Hello):
                reply: Message = handshake.challenge(request)
            else:
                assert isinstance(request, Proof)
                hello = handshake.check(request)
                reply = self._welcome(peer, hello)
        except CrailError as error:
            self._faults.warning("%s: refused: %s", peer.description, error.message)
            self._refuse(peer, error, is_fault=False)
            return
        peer.queue.append(reply_frame(frame.request_id, reply))
        self._dirty[peer] = None

    def _welcome(self, peer: Peer, hello: Hello) -> Welcome:
        peer.role, peer.client_id = hello.role, hello.client_id
        role = hello.role.name.lower().replace("_", " ")
        peer.description = f"{role} {hello.client_id:016x} ({peer.description})"
        welcome = self._handler.welcome(peer)
        peer.handshake = None
        del self._strangers[peer]
        peer.connection.authenticated()
        return welcome

    def _frame(self, peer: Peer, frame: Frame) -> None:
        if frame.flags & PUSH and frame.flags & REPLY:
            peer.push_replied(frame)
            return
        if frame.flags:
            raise ProtocolError(f"frame with flags 0x{frame.flags:02x} from a client")
        if frame.request_id in peer.in_flight:
            raise ProtocolError(f"request {frame.request_id} was sent twice on one connection")
        peer.in_flight.add(frame.request_id)
        self._open_request_count += 1
        awaited = self._examine(peer, frame)
        if frame.payload_bytes:
            peer.connection.receive_payload(awaited.target)
            peer.awaited = awaited
        else:
            self._hand_over(peer, awaited)

    def _examine(self, peer: Peer, frame: Frame) -> AwaitedPayload:
        opcode = opcode_of(frame.code)
        request: Message | None = None
        target: memoryview | None = None
        failure: CrailError | None = None
        try:
            if opcode is None or opcode not in self._operations:
                name = frame.code if opcode is None else opcode.name
                raise NotSupportedError(f"this server does not carry out operation {name}")
            request = decode_request(opcode, frame.body)
            if frame.payload_bytes:
                if not OPERATIONS[opcode].request_payload:
                    raise ProtocolError(f"{opcode.name} takes no payload")
                target = self._handler.payload_target(peer, opcode, request, frame.payload_bytes)
                assert target.nbytes == frame.payload_bytes
        except Exception as error:
            failure = self._answer_for(error, opcode, peer)
        return AwaitedPayload(frame.request_id, opcode, request, target, failure)

    def _payload_received(self, peer: Peer) -> None:
        awaited, peer.awaited = peer.awaited, None
        assert awaited is not None
        self._hand_over(peer, awaited)

    def _hand_over(self, peer: Peer, awaited: AwaitedPayload) -> None:
        request_id, opcode, request, payload, error = awaited
        if error is None:
            assert opcode is not None and request is not None
            try:
                self._handler.request(peer, opcode, request_id, request, payload)
            except Exception as raised:
                error = self._answer_for(raised, opcode, peer)
        if error is not None and request_id in peer.in_flight:
            peer.reply_error(request_id, error)
        if isinstance(error, ProtocolError):
            self._refuse(peer, error, is_fault=True)

    @staticmethod
    def _answer_for(error: Exception, opcode: Opcode | None, peer: Peer) -> CrailError:
        """What the peer is told; the trace of a fault in this program goes to the log."""
        if isinstance(error, CrailError):
            return error
        name = "request" if opcode is None else opcode.name
        log.error("%s from %s failed", name, peer.description, exc_info=error)
        return InternalError(f"{name} failed in the server; its log has the trace")

    # --- sending --------------------------------------------------------------------------------

    def request_answered(self, peer: Peer) -> None:
        self._open_request_count -= 1
        self.push_added(peer)

    def push_added(self, peer: Peer) -> None:
        if self._in_batch:
            self._dirty[peer] = None
        else:
            self._flush(peer)

    def close_asked(self, peer: Peer) -> None:
        self.push_added(peer)

    def _flush(self, peer: Peer) -> None:
        """Sends what the socket takes. A connection that is to end is shut down: that wakes the
        loop, which removes it."""
        waiting_bytes = peer.queue.byte_count
        try:
            drained = peer.queue.flush()
        except OSError as error:
            peer.closing = peer.closing or str(error)
            drained = False
        if peer.closing is not None:
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
            self._watch(peer, select.EPOLLIN)
            return
        # Frames that were left because of a limit are taken when the socket takes bytes again.
        waits = not drained or (peer.paused and not peer.saturated)
        if not waits:
            peer.send_stalled_s = None
        elif peer.send_stalled_s is None or peer.queue.byte_count < waiting_bytes:
            peer.send_stalled_s = time.monotonic()
        readable = 0 if peer.saturated else select.EPOLLIN
        self._watch(peer, readable | (select.EPOLLOUT if waits else 0))

    def _watch(self, peer: Peer, mask: int) -> None:
        if mask != peer.epoll_mask:
            self._epoll.modify(peer.sock.fileno(), mask)
            peer.epoll_mask = mask


def _describe(sock: socket.socket, place: object, *, is_local: bool) -> str:
    if is_local:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(credentials)
        return f"process {pid} of user {uid}"
    assert isinstance(place, tuple)
    return str(TcpAddress(place[0], place[1]))
