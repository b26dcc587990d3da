"""The lab's other host, as a test sees it: commands that run there.

Talks to ``scripts/lab.d/guest/agent.py``, whose protocol is described there: over TCP in a virtual
machine, over the pipes of a command (ssh, say) on real hardware.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO

AGENT_PORT = 7099


class PeerError(Exception):
    """The other host cannot be reached, or the command does not start there."""


class PeerProcess:
    """A command on the other host. Leaving its ``with`` block kills it and waits for its end."""

    def __init__(
        self, argv: Sequence[str], reader: IO[bytes], writer: IO[bytes], close: _Closer
    ) -> None:
        self.argv = list(argv)
        self.pid = -1
        self.returncode: int | None = None
        self._reader = reader
        self._writer = writer
        self._close = close
        self._output = bytearray()
        self._ended = False
        self._error: str | None = None
        self._changed = threading.Condition()
        self._follower = threading.Thread(target=self._follow, daemon=True)

    def output(self) -> str:
        """What it has written so far, stdout and stderr."""
        with self._changed:
            return self._output.decode(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """Waits until its output holds ``text``; returns the output so far.

        Raises:
            TimeoutError: not within ``timeout_s``.
            PeerError: it ended without; the message has its output.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while text.encode() not in self._output:
                if self._ended:
                    raise PeerError(f"{self} ended without saying {text!r}:\n{self.output()}")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self} did not say {text!r}:\n{self.output()}")
            return self._output.decode(errors="replace")

    def wait(self, timeout_s: float = 60) -> int:
        """Waits for its end; returns its exit code, negative for a signal.

        Raises:
            TimeoutError: it still runs after ``timeout_s``.
            PeerError: the other host went away before.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._ended:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self} still runs after {timeout_s} s:\n{self.output()}")
            if self.returncode is None:
                raise PeerError(self._error or f"the connection to {self} ended")
            return self.returncode

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        self._send({"signal": int(number)})

    def kill(self) -> None:
        """SIGKILL; ``wait`` tells when it is gone."""
        self.signal(signal.SIGKILL)

    def __str__(self) -> str:
        return f"peer's {shlex.join(self.argv)[:120]!r}"

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if not self._ended:
            with contextlib.suppress(PeerError, TimeoutError, OSError):
                self.kill()
                self.wait(10)
        self._close()
        self._follower.join(10)

    def _begin(self, env: Mapping[str, str], cwd: str | None) -> None:
        self._frame()  # the greeting
        self._send({"argv": self.argv, "env": dict(env), "cwd": cwd})
        frame = self._frame()
        if "pid" not in frame:
            raise PeerError(f"{self}: {frame.get('error', frame)}")
        self.pid = int(str(frame["pid"]))
        self._follower.start()

    def _send(self, frame: dict[str, object]) -> None:
        self._writer.write(json.dumps(frame).encode() + b"\n")
        self._writer.flush()

    def _frame(self) -> dict[str, object]:
        line = self._reader.readline()
        if not line:
            raise PeerError(f"the connection to {self} ended")
        return dict(json.loads(line))

    def _follow(self) -> None:
        error = None
        code = None
        try:
            while code is None:
                frame = self._frame()
                with self._changed:
                    if "output" in frame:
                        self._output += str(frame["output"]).encode("latin-1")
                    if "exit" in frame:
                        code = int(str(frame["exit"]))
                    self._changed.notify_all()
        except (PeerError, OSError, ValueError) as caught:
            error = str(caught)
        with self._changed:
            self.returncode, self._error, self._ended = code, error, True
            self._changed.notify_all()


class _Closer:
    """Ends the way to the agent, which kills what still runs there."""

    def __init__(
        self, connection: socket.socket | None, command: subprocess.Popen[bytes] | None
    ) -> None:
        self._connection = connection
        self._command = command

    def __call__(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
        if self._command is not None:
            assert self._command.stdin is not None
            with contextlib.suppress(OSError):
                self._command.stdin.close()
            try:
                self._command.wait(10)
            except subprocess.TimeoutExpired:
                self._command.kill()
                self._command.wait()


class Peer:
    """The other host. ``address`` is its IPv4 address on the data network."""

    def __init__(self, address: str, agent_command: str | None = None) -> None:
        """``agent_command`` reaches the agent by its pipes; None: over TCP at ``address``."""
        self.address = address
        self._agent_command = agent_command

    def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> PeerProcess:
        """Starts ``argv`` there, in the checkout unless ``cwd`` says otherwise.

        Raises:
            PeerError: the other host does not answer or cannot start it.
        """
        try:
            process = self._connect(argv)
        except OSError as error:
            raise PeerError(f"the agent at {self.address} does not answer: {error}") from error
        try:
            process._begin(env or {}, cwd)
        except BaseException:
            process._close()
            raise
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float = 60,
        check: bool = True,
    ) -> str:
        """Runs ``argv`` there to its end; returns its output.

        Raises:
            PeerError: it failed (with ``check``) or could not be run; the message has its output.
            TimeoutError: not done within ``timeout_s``; it has been killed.
        """
        with self.start(argv, env=env, cwd=cwd) as process:
            code = process.wait(timeout_s)
            if check and code:
                raise PeerError(f"{process} failed with {code}:\n{process.output()}")
            return process.output()

    def python(self, script: str, *arguments: str, timeout_s: float = 60) -> str:
        """Runs a Python script there; returns its output. Raises as ``run`` does."""
        return self.run(["python3", "-c", script, *arguments], timeout_s=timeout_s)

    def _connect(self, argv: Sequence[str]) -> PeerProcess:
        if self._agent_command is None:
            connection = socket.create_connection((self.address, AGENT_PORT), timeout=30)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Where the link goes down for good, reading ends after half a minute.
            for option, value in (
                (socket.TCP_KEEPIDLE, 10),
                (socket.TCP_KEEPINTVL, 5),
                (socket.TCP_KEEPCNT, 4),
            ):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            reader, writer = connection.makefile("rb"), connection.makefile("wb")
            return PeerProcess(argv, reader, writer, _Closer(connection, None))
        command = subprocess.Popen(
            shlex.split(self._agent_command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ,
        )
        assert command.stdin is not None
        assert command.stdout is not None
        return PeerProcess(argv, command.stdout, command.stdin, _Closer(None, command))
