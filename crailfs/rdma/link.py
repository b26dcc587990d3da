"""The client's end of one connection: what is posted to its queue pair, and what became of it.

An operation is a few work requests that belong together: a WRITE and the FLUSH behind it. What
tasks ask for in one round of the event loop is posted as one batch, with one doorbell, and only its
last request asks for a completion: a queue pair completes in order, so that one stands for all
before it. Long batches ask in between too, so that their first buffers need not wait for their
last.
"""

from __future__ import annotations

import collections
import enum
import logging
import math
from typing import Any, Final, NamedTuple

import trio

from crailfs.errors import UnavailableError
from crailfs.net.waiting import Spinner
from crailfs.rdma.buffers import Lease
from crailfs.rdma.completions import POLL_MAX, CompletionQueue
from crailfs.rdma.device import Device
from crailfs.rdma.queue_pair import QueuePair, reads_max
from crailfs.rdma.verbs import plain_errors
from crailfs.units import MIB
from crailfs.wire.messages import QueuePairEnd

log = logging.getLogger(__name__)

REQUESTS_MAX: Final = 256
"""Work requests posted and not completed."""
SIGNAL_BYTES: Final = 1 * MIB
"""A batch asks for a completion at least this often."""
SILENCE_S: Final = 5.0
"""A device that completes nothing for this long, good or bad, is given up. Peers that are gone are
noticed sooner: see ``queue_pair.ACK_TIMEOUT``."""


_abandoned: Final[list[object]] = []
"""What devices did not let go of."""


class Kind(enum.Enum):
    WRITE = "writes"
    READ = "reads"
    FLUSH = "flushes"
    """RDMA FLUSH of the range with persistent placement."""


class Request(NamedTuple):
    kind: Kind
    address: int
    """At the server."""
    key: int
    byte_count: int
    local: Lease | None
    """None for a FLUSH."""
    local_offset: int = 0


class _Operation:
    def __init__(self, requests: tuple[Request, ...]) -> None:
        self.requests = requests
        """They hold the memory that the device works on, also for a caller that has gone."""
        self.reads = sum(request.kind != Kind.WRITE for request in requests)
        self.number = 0
        self.done = trio.Event()


class Link:
    """``run`` must be running from ``connect`` on; used from one trio thread."""

    def __init__(self, device: Device, counters: collections.Counter[str]) -> None:
        """Raises ``UnavailableError``."""
        self.failure: str | None = None
        """Why it is of no use any more. Then the queue pair is gone as well: nothing that was
        posted is sent, and the device has let go of all memory."""
        self._device = device
        self._counters = counters
        self._requests_max = min(REQUESTS_MAX, device.requests_max)
        self._reads_max = 0
        self._completions = CompletionQueue(device, self._requests_max)
        try:
            self._pair = QueuePair(device, self._completions.queue, requests_max=self._requests_max)
        except BaseException:
            self._completions.close()
            raise
        self._spinner = Spinner(self._completions.fd)
        self._waiting: collections.deque[_Operation] = collections.deque()
        self._posted: collections.deque[_Operation] = collections.deque()
        self._posted_requests = 0
        self._posted_reads = 0
        self._last_number = 0
        self._gathering = False
        self._patience = trio.CancelScope()
        self._running = trio.CancelScope()

    @property
    def end(self) -> QueuePairEnd:
        return self._pair.end

    def connect(self, peer: QueuePairEnd) -> None:
        """Raises ``InvalidError`` and ``UnavailableError``."""
        self._pair.connect(peer)
        # FLUSHes are counted as READs: the target keeps the same kind of state for both.
        self._reads_max = max(1, reads_max(self._device, peer))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Returns when the link has failed or was closed."""
        task_status.started()
        try:
            with self._running:
                while True:
                    with trio.CancelScope() as self._patience:
                        self._be_patient()
                        await trio.lowlevel.wait_readable(self._completions.fd)
                        self._counters["wakeups"] += 1
                    seen = self._counters["completions"]
                    self._take_completions()
                    if self._patience.cancelled_caught and self._counters["completions"] == seen:
                        self.fail(f"the device completed nothing for {SILENCE_S:g} s")
        finally:
            self.discard("the connection was closed")

    def discard(self, reason: str) -> None:
        """``fail``, for a link that is not run (any more)."""
        self.fail(reason)
        try:
            with plain_errors("closing a completion queue"):
                self._completions.close()
        except UnavailableError as error:
            log.error("%s", error.message)

    async def perform(self, *requests: Request) -> None:
        """Carry them out in this order. At most one of them is a READ or FLUSH.

        Raises ``UnavailableError`` if the link fails before they are known to be done: then they
        may have been carried out or not, and will not be any more once the server has destroyed
        its end too.
        """
        operation = _Operation(requests)
        assert operation.reads <= 1 and len(requests) <= self._requests_max
        self._check()
        self._waiting.append(operation)
        try:
            if not self._gathering:
                self._gathering = True
                try:
                    await trio.lowlevel.checkpoint()
                finally:
                    self._gathering = False
                    self._post_waiting()
                if len(self._posted) == 1 and not self._waiting:
                    self._wait_in_place(operation)
            await operation.done.wait()
        except trio.Cancelled:
            if operation in self._waiting:
                self._waiting.remove(operation)
            raise
        if not operation.number:
            self._check()

    def fail(self, reason: str) -> None:
        """Give the link up: what is under way raises ``UnavailableError``."""
        if self.failure is not None:
            return
        self.failure = reason
        self._running.cancel()
        under_way = (*self._posted, *self._waiting)
        try:
            self._pair.destroy()
        except UnavailableError as error:
            log.error("%s: memory that the device may still use is not used again", error.message)
            _abandoned.append(under_way)
        for operation in under_way:
            operation.number = 0
            operation.done.set()
        self._posted.clear()
        self._waiting.clear()

    def _check(self) -> None:
        if self.failure is not None:
            raise UnavailableError(f"the RDMA connection to the storage server: {self.failure}")

    def _post_waiting(self) -> None:
        batch: list[_Operation] = []
        while self._waiting and self.failure is None:
            operation = self._waiting[0]
            if (
                self._posted_requests + len(operation.requests) > self._requests_max
                or self._posted_reads + operation.reads > self._reads_max
            ):
                break
            self._waiting.popleft()
            self._last_number += 1
            operation.number = self._last_number
            self._posted_requests += len(operation.requests)
            self._posted_reads += operation.reads
            batch.append(operation)
        if not batch:
            return
        idle = not self._posted
        self._posted += batch
        if idle:
            self._be_patient()
        try:
            self._post(batch)
        except UnavailableError as error:
            self.fail(error.message)

    def _post(self, batch: list[_Operation]) -> None:
        enums, pair, counters = self._device.verbs.enums, self._pair.pair, self._counters
        unsignalled_bytes = 0
        with plain_errors("posting to the queue pair"):
            # Between start and complete or abort the send queue is locked.
            pair.wr_start()
            try:
                for operation in batch:
                    for request in operation.requests:
                        unsignalled_bytes += request.byte_count
                        last = request is operation.requests[-1]
                        signal = last and (
                            operation is batch[-1] or unsignalled_bytes >= SIGNAL_BYTES
                        )
                        if signal:
                            unsignalled_bytes = 0
                        pair.wr_id = operation.number
                        pair.wr_flags = enums.IBV_SEND_SIGNALED if signal else 0
                        self._add(pair, request)
                        counters[request.kind.value] += 1
            except BaseException:
                pair.wr_abort()
                raise
            pair.wr_complete()
        counters["doorbells"] += 1

    def _be_patient(self) -> None:
        """The device has ``SILENCE_S`` from now on, if it has anything to do."""
        self._patience.deadline = trio.current_time() + SILENCE_S if self._posted else math.inf

    def _add(self, pair: Any, request: Request) -> None:
        enums = self._device.verbs.enums
        if request.local is None:
            pair.wr_flush(
                request.key, request.address, request.byte_count,
                enums.IBV_FLUSH_PERSISTENT, enums.IBV_FLUSH_RANGE,
            )  # fmt: skip
            return
        if request.kind == Kind.WRITE:
            pair.wr_rdma_write(request.key, request.address)
        else:
            pair.wr_rdma_read(request.key, request.address)
        at = request.local.address + request.local_offset
        pair.wr_set_sge(self._device.verbs.wr.SGE(at, request.byte_count, request.local.key))

    def _wait_in_place(self, operation: _Operation) -> None:
        """For an operation that is alone: see ``crailfs.net.waiting``."""
        if self.failure is None and self._spinner.wait():
            self._counters["waits_in_place"] += 1
            self._take_completions()

    def _take_completions(self) -> None:
        if self.failure is not None:
            return
        try:
            with plain_errors("reading the completion queue"):
                self._completions.acknowledge()
                completions = self._completions.poll()
                while completions:
                    self._completed(completions)
                    if len(completions) < POLL_MAX or self.failure is not None:
                        break
                    completions = self._completions.poll()
        except UnavailableError as error:
            self.fail(error.message)
        self._post_waiting()

    def _completed(self, completions: list[Any]) -> None:
        self._counters["completions"] += len(completions)
        for completion in completions:
            if completion.status != 0:
                self.fail(f"work completion with status {completion.status} (ibv_wc_status)")
                return
            while self._posted and self._posted[0].number <= completion.wr_id:
                operation = self._posted.popleft()
                self._posted_requests -= len(operation.requests)
                self._posted_reads -= operation.reads
                operation.done.set()
        self._be_patient()
