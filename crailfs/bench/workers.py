"""Runs one workload session in several processes that start each phase at the same instant.

Only the workers ever touch the directory that is measured: a mount that no longer answers holds up
a worker, which is killed and given up at its time limit, and never the program that reports it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

_REAP_SECONDS: Final = 2.0
_MESSAGE_LIMIT_BYTES: Final = 1 << 16


class Phase(NamedTuple):
    """One timed part of a session."""

    workload: str
    run: Callable[[], int]
    """Does the work and returns how much it was: bytes, or operations."""


Session = Callable[[int], Iterator[Phase]]
"""Given the worker's index, yields its phases; what it does between two of them is not timed."""


class Timing(NamedTuple):
    workload: str
    amount: int
    """Bytes or operations of all workers together."""
    seconds: float
    """From the first worker's start to the last one's end."""


class WorkerFailedError(Exception):
    """A worker raised, died, or did not finish within its time limit."""


class _Worker:
    def __init__(self, session: Session, index: int, siblings: list[_Worker]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                # With a copy of a sibling's parent end here, that one would not see us go.
                for worker in [self, *siblings]:
                    worker.socket.close()
                status = _work(session, index, theirs)
            finally:
                # Neither the parent's buffers nor its exit handlers are ours to run.
                os._exit(status)
        theirs.close()

    def kill(self) -> None:
        """A worker that even this does not end hangs in the kernel; ``reap`` then leaves it to
        whoever aborts that mount."""
        os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        self.socket.close()
        deadline = time.monotonic() + _REAP_SECONDS
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)


def _work(session: Session, index: int, parent: socket.socket) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    phases = session(index)
    try:
        for workload, run in phases:
            parent.send(json.dumps({"ready": workload}).encode())
            if not parent.recv(1):
                return 1
            began_ns = time.monotonic_ns()
            amount = run()
            ended_ns = time.monotonic_ns()
            result = {"amount": amount, "began_ns": began_ns, "ended_ns": ended_ns}
            parent.send(json.dumps(result).encode())
        parent.send(json.dumps({"finished": True}).encode())
    except Exception as error:
        parent.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        return 1
    finally:
        close = getattr(phases, "close", None)
        if close is not None:
            close()
    return 0


def run_session(
    session: Session,
    process_count: int,
    *,
    phase_timeout_seconds: float,
    on_wait: Callable[[str], None] = lambda _: None,
) -> list[Timing]:
    """Run ``session`` in ``process_count`` processes, each phase behind a barrier.

    Args:
        phase_timeout_seconds: the limit of each phase, and of what lies between two.
        on_wait: called a few times a second with what is waited for.

    Raises:
        WorkerFailedError: says in which phase, and what happened.
    """
    workers: list[_Worker] = []
    for index in range(process_count):
        workers.append(_Worker(session, index, workers))
    timings: list[Timing] = []
    doing = "preparation"

    def collect() -> list[dict[str, object]]:
        return _one_message_each(workers, doing, phase_timeout_seconds, on_wait)

    try:
        while True:
            states = collect()
            if any("finished" in state for state in states):
                return timings
            doing = str(states[0]["ready"])
            for worker in workers:
                worker.socket.send(b"g")
            results = collect()
            first = min(_integer(result, "began_ns") for result in results)
            last = max(_integer(result, "ended_ns") for result in results)
            amount = sum(_integer(result, "amount") for result in results)
            timings.append(Timing(doing, amount, max(last - first, 1) / 1e9))
            doing = f"what follows {doing}"
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        for worker in workers:
            worker.reap()


def _one_message_each(
    workers: list[_Worker],
    doing: str,
    timeout_seconds: float,
    on_wait: Callable[[str], None],
) -> list[dict[str, object]]:
    messages: dict[int, dict[str, object]] = {}
    deadline = time.monotonic() + timeout_seconds
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.socket, selectors.EVENT_READ, worker)
        while len(messages) < len(workers):
            on_wait(doing)
            if time.monotonic() > deadline:
                raise WorkerFailedError(f"{doing}: no answer within {timeout_seconds:.0f} s")
            for key, _ in selector.select(0.2):
                worker = key.data
                raw = worker.socket.recv(_MESSAGE_LIMIT_BYTES)
                if not raw:
                    raise WorkerFailedError(f"{doing}: a worker process died")
                message: dict[str, object] = json.loads(raw)
                if "error" in message:
                    raise WorkerFailedError(f"{doing}: {message['error']}")
                messages[worker.pid] = message
                selector.unregister(worker.socket)
    return [messages[worker.pid] for worker in workers]


def _integer(message: dict[str, object], key: str) -> int:
    value = message[key]
    assert isinstance(value, int)
    return value
