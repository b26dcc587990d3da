"""The host's end of a guest's agent: runs one command at a time and follows its output."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

_SILENT_S = 1.0


class GuestError(Exception):
    """The guest ended, hung so that QEMU must be killed, or failed; str() says which."""


class Channel:
    """A connected channel. Every wait has a deadline on ``time.monotonic``'s clock."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()

    def wait_ready(self, deadline: float) -> None:
        """Returns when the guest is prepared.

        Raises:
            GuestError: it ended before, or was not ready in time.
        """
        if self._frame(deadline) is None:
            raise GuestError("the guest was not ready within its time limit")

    def begin(self, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Starts ``argv`` in the guest; ``event`` tells what becomes of it."""
        request = json.dumps({"argv": list(argv), "env": env or {}})
        try:
            self._connection.sendall(request.encode() + b"\n")
        except OSError as error:
            raise GuestError("the guest ended by itself") from error

    def event(self, deadline: float) -> bytes | int | None:
        """The next output of the command, or its exit code (negative: a signal); None: nothing
        before the deadline.

        Raises:
            GuestError: the guest ended, or the command does not start.
        """
        while (frame := self._frame(deadline)) is not None:
            if "output" in frame:
                return str(frame["output"]).encode("latin-1")
            if "exit" in frame:
                return int(frame["exit"])
            if "error" in frame:
                raise GuestError(str(frame["error"]))
        return None

    def run(
        self,
        argv: Sequence[str],
        deadline: float,
        output: Callable[[bytes], object],
        env: dict[str, str] | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> int:
        """Runs ``argv`` in the guest to its end; returns its exit code (negative: a signal).

        ``check`` is called whenever the guest was silent for a second, and may raise.

        Raises:
            GuestError: the guest ended, or the command was not done in time.
        """
        self.begin(argv, env)
        while time.monotonic() < deadline:
            event = self.event(min(deadline, time.monotonic() + _SILENT_S))
            if isinstance(event, int):
                return event
            if event is None:
                check()
            else:
                output(event)
        raise GuestError(f"{' '.join(argv)[:80]!r} was not done within its time limit")

    def drain(self, output: Callable[[bytes], object]) -> None:
        """What was on its way when QEMU was killed."""
        with contextlib.suppress(GuestError):
            while True:
                event = self.event(time.monotonic() + 10)
                if isinstance(event, bytes):
                    output(event)

    def _frame(self, deadline: float) -> dict[str, Any] | None:
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._connection.recv(1 << 16)
            except TimeoutError:
                return None
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise GuestError("the guest ended by itself")
            self._received += chunk
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        return dict(json.loads(line))
