"""Runs commands in a lab guest: for the host over a virtio-serial port, for the other guest over
TCP; or, with ``--stdio``, on a real host for whoever started it (over ssh).

One JSON object a line, both ways. A stream runs one command at a time:

======================================== ====================================================
to the agent                             from the agent
======================================== ====================================================
                                         ``{"ready": true}`` once
``{"argv": [...], "cwd": s, "env": {}}`` ``{"pid": n}`` or ``{"error": s}``
``{"signal": n}`` (to its group)         ``{"output": s}``: stdout and stderr, a byte a character
                                         ``{"exit": n}``: as ``subprocess`` counts it
======================================== ====================================================

The end of a stream kills what it runs; the host's stream ends when QEMU does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

PORT = 7099
"""TCP port on the lab's private network, which nothing but the other guest can reach."""
HOST_CHANNEL = "crail.lab"
_CHECKOUT = Path(__file__).resolve().parents[3]
"""Where commands run unless they say otherwise."""


class Stream:
    """One client of the agent."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader = reader
        self._writer = writer
        self._sending = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def serve(self) -> None:
        self._send({"ready": True})
        try:
            while line := self._reader.readline():
                self._obey(json.loads(line))
        finally:
            self._signal(signal.SIGKILL)

    def _obey(self, request: dict[str, Any]) -> None:
        if "signal" in request:
            self._signal(request["signal"])
        elif self._process is not None:
            self._send({"error": "this stream already runs a command"})
        else:
            try:
                self._process = subprocess.Popen(
                    request["argv"],
                    cwd=request.get("cwd") or _CHECKOUT,
                    env=os.environ | request.get("env", {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._send({"error": f"{request['argv'][0]} does not start: {error}"})
                return
            self._send({"pid": self._process.pid})
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        pump = threading.Thread(target=self._pump, args=(process,), daemon=True)
        pump.start()
        code = process.wait()
        # What it left in the background may hold the pipe open for ever.
        pump.join(timeout=2)
        self._process = None
        self._send({"exit": code})

    def _pump(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            self._send({"output": chunk.decode("latin-1")})

    def _signal(self, number: int) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _send(self, frame: dict[str, Any]) -> None:
        # A client that has gone needs no answer.
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionError, ValueError):
            self._writer.write(json.dumps(frame).encode() + b"\n")
            self._writer.flush()


def host_port() -> Path:
    """The character device of the channel to the host."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == HOST_CHANNEL:
            return Path("/dev") / name.parent.name
    raise SystemExit(f"no virtio-serial port is called {HOST_CHANNEL}")


def serve_tcp() -> None:
    listener = socket.create_server(("", PORT))
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def serve(connection: socket.socket = connection) -> None:
            with connection, contextlib.suppress(ConnectionError):
                Stream(connection.makefile("rb"), connection.makefile("wb")).serve()

        threading.Thread(target=serve, daemon=True).start()


def main() -> None:
    if sys.argv[1:] == ["--stdio"]:
        Stream(sys.stdin.buffer, sys.stdout.buffer).serve()
        return
    threading.Thread(target=serve_tcp, daemon=True).start()
    descriptor = os.open(host_port(), os.O_RDWR)
    with open(descriptor, "rb") as reader, open(os.dup(descriptor), "wb") as writer:
        Stream(reader, writer).serve()


if __name__ == "__main__":
    main()
