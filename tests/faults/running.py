"""The loads of ``load`` and ``reader`` as processes, and what they have been promised so far."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from crailfs.limits import OPERATION_TIMEOUT_MS
from tests.faults.load import KEPT, content
from tests.support.mounts import REPOSITORY
from tests.support.process_cluster import ProcessCluster

ACKNOWLEDGEMENT_TIMEOUT_S = OPERATION_TIMEOUT_MS / 1000 + 5


class _Lines:
    """What a process says on stdout, line by line. Leaving the block kills the process."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            (sys.executable, "-m", module, *arguments), stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout
        self._buffer = b""

    def next(self) -> str:
        deadline = time.monotonic() + ACKNOWLEDGEMENT_TIMEOUT_S
        while b"\n" not in self._buffer:
            waiting = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._output], [], [], waiting)
            piece = os.read(self._output.fileno(), 65536) if readable else b""
            assert readable, f"no acknowledgement within {ACKNOWLEDGEMENT_TIMEOUT_S} s"
            assert piece, "the load ended by itself"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def end(self) -> list[str]:
        """Kill the process; all that it had said and nobody had read. Again: nothing."""
        if self._output.closed:
            return []
        self.process.kill()
        rest = self._buffer + self._output.read()
        self.process.wait(20)
        self._output.close()
        whole, _, _ = rest.rpartition(b"\n")
        return whole.decode().splitlines()


class Reading:
    """Files of ``directories`` are read and checked all the time until ``end``."""

    def __init__(self, directories: Sequence[Path], seed: int) -> None:
        self._lines = _Lines("tests.faults.reader", str(seed), *map(str, directories))

    def end(self) -> int:
        """Nothing that was read was wrong, or an error, or late; how many files were."""
        lines = self._lines.end()
        errors = [line for line in lines if line.startswith("!")]
        assert not errors, errors
        waits_ms = [int(line.split()[1]) for line in lines]
        slowest_ms = max(waits_ms, default=0)
        assert slowest_ms < OPERATION_TIMEOUT_MS, f"a read took {slowest_ms} ms"
        print(f"the slowest read took {slowest_ms} ms")
        return len(lines)

    def kill(self) -> None:
        """Whatever was read does not count."""
        self._lines.end()


class Load:
    """Files in ``directory``, written through the mount or through the Python API."""

    def __init__(self, cluster: ProcessCluster, name: str, seed: int) -> None:
        self.directory = cluster.mountpoint / name
        self.errors: list[str] = []
        self._cluster = cluster
        self._seed = seed
        self._temporary: set[int] = set()
        self._final: set[int] = set()
        self._gone: set[int] = set()
        self._uncertain: set[int] = set()
        """Files whose step was cut off: old or new state, both are right."""
        self.step_count = 0
        """Steps that were acknowledged."""
        self._next_index = 0
        self._lines: _Lines | None = None

    def start(self, *, api_transport: str = "") -> None:
        """Through the mount, or with ``api_transport`` by a client of its own."""
        arguments = [str(self._seed), str(self._next_index)]
        if api_transport:
            configuration = str(self._cluster.configuration)
            arguments += ["api", f"/{self.directory.name}", configuration, api_transport]
        else:
            arguments += ["mount", str(self.directory)]
        self._lines = _Lines("tests.faults.load", *arguments)

    def acknowledged(self, count: int) -> None:
        """Wait for ``count`` more acknowledged steps."""
        assert self._lines is not None
        for _ in range(count):
            self._note(self._lines.next())

    def end(self) -> None:
        """Kill the load; whatever it was doing is uncertain."""
        if self._lines is not None:
            for line in self._lines.end():
                self._note(line)
            self._lines = None
            self._uncertain |= {self._next_index, self._next_index - 1 - KEPT}
            self._next_index += 1

    def _note(self, line: str) -> None:
        sign, number, *_ = line.split()
        index = int(number)
        self.step_count += sign != "!"
        if sign != "-":
            self._next_index = max(self._next_index, index + 1)
        if sign == "+":
            self._temporary.add(index)
        elif sign == ">":
            self._temporary.discard(index)
            self._final.add(index)
        elif sign == "-":
            self._final.discard(index)
            self._gone.add(index)
        else:
            self.errors.append(line)
            self._uncertain |= {index, index - KEPT}

    def check(self) -> None:
        """Everything promised is there with its bytes, and what was removed stays removed."""
        present = set(os.listdir(self.directory))
        for index in self._final - self._uncertain:
            assert str(index) in present, f"file {index} was acknowledged and is missing"
            self._check_bytes(str(index), index)
        for index in self._temporary - self._uncertain:
            names = {f"{index}.part", str(index)} & present
            assert names, f"file {index} was closed and is missing"
            self._check_bytes(names.pop(), index)
        assert not {str(index) for index in self._gone} & present, "a removed file came back"

    def _check_bytes(self, name: str, index: int) -> None:
        data = (self.directory / name).read_bytes()
        assert data == content(self._seed, index), f"file {name} has other bytes"

    def remove_all(self) -> None:
        """Forget everything; the directory goes too."""
        self._temporary.clear()
        self._final.clear()
        self._gone.clear()
        for path in self.directory.iterdir():
            path.unlink()
        self.directory.rmdir()
