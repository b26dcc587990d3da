"""The host's end of a guest's agent: runs one command at a time and follows its output."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence


class GuestError(Exception):
    """The guest ended, or hung so that QEMU had to be killed; str() says which."""


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
        frame = self._frame(deadline, "not ready")
        if not frame.get("ready"):
            raise GuestError(f"the guest's agent began with {frame}")

    def run(
        self,
        argv: Sequence[str],
        deadline: float,
        output: Callable[[bytes], None],
        env: dict[str, str] | None = None,
    ) -> int:
        """Runs ``argv`` in the guest to its end; returns its exit code (negative: a signal).

        Raises:
            GuestError: the guest ended, or the command was not done in time.
        """
        for frame in self.start(argv, deadline, env):
            if "exit" in frame:
                return int(frame["exit"])  # type: ignore[call-overload, no-any-return]
            output(str(frame["output"]).encode("latin-1"))
        raise AssertionError("frames end with an exit or an exception")

    def start(
        self, argv: Sequence[str], deadline: float, env: dict[str, str] | None = None
    ) -> Iterator[dict[str, object]]:
        """Starts ``argv``; yields its ``output`` frames and last its ``exit``.

        Raises:
            GuestError: as ``run``; also when the command does not start.
        """
        request = json.dumps({"argv": list(argv), "env": env or {}})
        self._connection.sendall(request.encode() + b"\n")
        while True:
            frame = self._frame(deadline, "not done")
            if "error" in frame:
                raise GuestError(str(frame["error"]))
            if "pid" not in frame:
                yield frame
            if "exit" in frame:
                return

    def _frame(self, deadline: float, late: str) -> dict[str, object]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._connection.recv(1 << 16)
            except TimeoutError:
                raise GuestError(f"the guest was {late} within its time limit") from None
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise GuestError("the guest ended by itself")
            self._received += chunk
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        return dict(json.loads(line))
