"""Whatever instant the server dies at, what it acknowledged is there afterwards.

First every instant: each system call that writes is taken apart into before, half way (writes) and
after, the state directory is copied there, and each copy is opened. Then real processes, killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import CreateNode, Opcode, RemoveNode, RenameNode
from metadata_server import journal as journal_module
from metadata_server import state_directory
from metadata_server.driver import Driver
from metadata_server.txn import Txn
from tests.metadata.name_space import CLIENT, Clock, NameSpace, config


class Instant(NamedTuple):
    label: str
    state: Path
    acknowledged: frozenset[bytes]
    """The names that must be there."""
    attempted: frozenset[bytes]
    """Those that may be there."""


class Recorder:
    """Copies the state directory at every step of what is written to it."""

    def __init__(self, state: Path, copies: Path, patch: pytest.MonkeyPatch) -> None:
        self._state = state
        self._copies = copies
        self.instants: list[Instant] = []
        self.acknowledged: frozenset[bytes] = frozenset()
        self.attempted: frozenset[bytes] = frozenset()
        for name in ("ftruncate", "replace", "rename", "fsync", "fdatasync"):
            patch.setattr(os, name, self._stepwise(name, getattr(os, name)))
        patch.setattr(os, "pwrite", self._half_way(os.pwrite))
        patch.setattr(Txn, "commit_as", self._stepwise("commit", Txn.commit_as))

    def copy(self, label: str) -> None:
        copy = self._copies / f"{len(self.instants):03d}"
        if self._state.exists():
            shutil.copytree(self._state, copy)
        self.instants.append(Instant(label, copy, self.acknowledged, self.attempted))

    def _stepwise(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepwise(*arguments: Any) -> Any:
            self.copy(f"before {name}")
            result = function(*arguments)
            self.copy(f"after {name}")
            return result

        return stepwise

    def _half_way(self, pwrite: Callable[..., int]) -> Callable[..., int]:
        def half_way(descriptor: int, data: bytes, offset: int) -> int:
            self.copy("before write")
            half = len(data) // 2
            pwrite(descriptor, data[:half], offset)
            self.copy("half way through write")
            pwrite(descriptor, data[half:], offset + half)
            self.copy("after write")
            return len(data)

        return half_way


def _work(recorder: Recorder, driver: Driver) -> None:
    """Three batches, a checkpoint, one batch more; each name is acknowledged by its batch."""
    recorder.acknowledged = frozenset()
    names: set[bytes] = set()
    for batch in range(4):
        for name in (b"%d.a" % batch, b"%d.b" % batch):
            names.add(name)
            request = CreateNode(ROOT_INODE, name, NodeKind.DIRECTORY, 0o755, 0, 0)
            driver.execute(CLIENT, 0, Opcode.CREATE_NODE, request)
        recorder.attempted = frozenset(names)
        driver.write_batch()
        recorder.acknowledged = frozenset(names)
        if batch == 1:
            driver.sync_journal()
        if batch == 2:
            driver.checkpoint()


def _check(instant: Instant, clock: Clock) -> None:
    space = NameSpace(instant.state, clock)
    found = frozenset(space.names())
    assert instant.acknowledged <= found <= instant.attempted, instant.label
    space.assert_sound()
    space.create(b"new")
    space.reopen()
    assert frozenset(space.names()) == found | {b"new"}, instant.label
    space.driver.close()


def test_every_instant_of_a_life(tmp_path: Path) -> None:
    """From the making of the name space to a clean stop."""
    state = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(state, tmp_path / "copies", patch)
        driver = Driver.open(config(state), clock_ns=Clock())
        _work(recorder, driver)
        driver.close()
    assert len(recorder.instants) > 40
    for instant in recorder.instants:
        _check(instant, Clock())


def test_every_instant_of_a_recovery(tmp_path: Path) -> None:
    """A server that dies while it applies the journal of one that died before."""
    state = tmp_path / "state"
    driver = Driver.open(config(state), clock_ns=Clock())
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(state, tmp_path / "unused", patch)
        _work(recorder, driver)
    names = recorder.acknowledged
    driver._txn.abort()
    driver._state.close()
    with (state / "journal").open("ab") as journal:
        journal.write(b"torn")
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(state, tmp_path / "copies", patch)
        recorder.acknowledged = recorder.attempted = names
        Driver.open(config(state), clock_ns=Clock()).close()
    assert len(recorder.instants) > 10
    for instant in recorder.instants:
        _check(instant, Clock())


def test_the_recorder_sees_what_the_server_writes_with() -> None:
    """Should these modules learn another way to write, the recorder must learn it too."""
    known = {"pwrite", "ftruncate", "replace", "rename", "fsync", "fdatasync", "open", "close"}
    reading = {"pread", "fstat", "getpid", "getuid", "getgid", "urandom"}
    for module in (journal_module, state_directory):
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        used = {word.split("(")[0] for word in source.split("os.")[1:] if "(" in word[:12]}
        assert {word for word in used if word.isidentifier()} <= known | reading


# --- processes ----------------------------------------------------------------------------------


def _child(state: Path, seed: int) -> None:
    """Work until killed; says the number of each operation once it is acknowledged."""
    choose = random.Random(seed)
    driver = Driver.open(config(state))
    number = driver.run(lambda txn, _: txn.node(ROOT_INODE).size)
    while True:
        batch = choose.randint(1, 8)
        for _ in range(batch):
            _operation(driver, number)
            number += 1
        driver.write_batch()
        os.write(1, b"%d\n" % number)
        if choose.random() < 0.1:
            driver.checkpoint()


def _operation(driver: Driver, number: int) -> None:
    """Net, one entry of the root more."""
    name = b"%06d" % number
    driver.execute(
        CLIENT, 0, Opcode.CREATE_NODE, CreateNode(ROOT_INODE, name, NodeKind.FILE, 0o644, 0, 0)
    )
    if number % 3 == 0:
        driver.execute(
            CLIENT, 0, Opcode.RENAME_NODE, RenameNode(ROOT_INODE, name, ROOT_INODE, name + b"r")
        )
    if number % 5 == 0:
        temporary = CreateNode(ROOT_INODE, b"t", NodeKind.DIRECTORY, 0o755, 0, 0)
        made = driver.execute(CLIENT, 0, Opcode.CREATE_NODE, temporary).reply
        ino = made.attributes.ino  # type: ignore[union-attr]
        driver.execute(CLIENT, 0, Opcode.REMOVE_NODE, RemoveNode(ROOT_INODE, b"t", True, ino))


@pytest.mark.fault
def test_killed_processes(tmp_path: Path) -> None:
    seed = 20_240_501
    choose = random.Random(seed)
    print(f"seed {seed}")
    state = tmp_path / "state"
    acknowledged = 0
    for round_number in range(8):
        command = [sys.executable, "-m", __name__, str(state), str(choose.getrandbits(32))]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(choose.randint(1, 400)):
                acknowledged = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            said = child.stdout.read().split(b"\n")
            acknowledged = int(said[-2]) if len(said) > 1 else acknowledged
        driver = Driver.open(config(state))
        reply = driver.audit()
        entries = driver.run(lambda txn, _: txn.node(ROOT_INODE).size)
        driver.close()
        assert reply.findings == (), f"round {round_number}"
        assert acknowledged <= entries <= acknowledged + 9, f"round {round_number}"


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]))
