"""Mounts for tests, which never outlive the test run.

A mount that hangs takes the test process with it (the test's time limit ends that by exiting), so
somebody else must clean up: a guard process, which notices by the end of a pipe that the test
process has ended, however it did, aborts the FUSE connection and unmounts lazily. The mount's own
process ends by itself then.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fuse_client.mountpoints import abort_and_unmount, find_mount
from tests.support.processes import ServerProcess

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
_GUARD = """
import os, signal, sys
from pathlib import Path
from fuse_client.mountpoints import abort_and_unmount, find_mount
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while os.read(0, 1):
    pass
mount = find_mount(Path(sys.argv[1]))
if mount is not None:
    abort_and_unmount(mount)
for name in sys.argv[2:]:
    Path(name).unlink(missing_ok=True)
"""


@contextlib.contextmanager
def guarded(mountpoint: Path, *files: Path) -> Iterator[None]:
    """Whatever is mounted at ``mountpoint`` when the block (or this process) ends is aborted and
    unmounted, and ``files`` are removed."""
    reading, writing = os.pipe()
    try:
        guard = subprocess.Popen(
            [sys.executable, "-c", _GUARD, str(mountpoint), *map(str, files)],
            stdin=reading,
            cwd=REPOSITORY,
            start_new_session=True,
        )
    finally:
        os.close(reading)
    try:
        yield
    finally:
        os.close(writing)
        guard.wait(20)


@contextlib.contextmanager
def mounted(mountpoint: Path, options: Sequence[str], log: Path) -> Iterator[ServerProcess]:
    """A ``crail mount`` of a cluster that ``options`` name, usable inside the block.

    It is unmounted by SIGTERM at the end; the mount process must end by itself and leave no mount.
    """
    mountpoint.mkdir(exist_ok=True)
    with (
        guarded(mountpoint),
        ServerProcess(["mount", str(mountpoint), *options], log) as process,
    ):
        yield process
        if process.process.poll() is None:
            process.stop()
            assert find_mount(mountpoint) is None, f"still mounted:\n{process.log_text()}"


def unmount(mountpoint: Path) -> None:
    """``umount`` by force, as after a crash; nothing mounted is fine."""
    mount = find_mount(mountpoint)
    if mount is not None:
        abort_and_unmount(mount)


def in_child(
    function: Callable[[], T],
    *,
    uid: int = 0,
    gid: int = 0,
    groups: Sequence[int] = (),
    timeout_s: float = 20.0,
) -> T:
    """What ``function`` returns, or raises, in a forked process with these credentials.

    A child that has not answered in time is killed and fails the test: it hangs in the kernel.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(function, writing, uid, gid, groups)
    os.close(writing)
    try:
        answer = _read_all(reading, timeout_s)
    except TimeoutError:
        os.kill(child, 9)
        raise AssertionError(f"{function} did not answer within {timeout_s} s") from None
    finally:
        os.close(reading)
    os.waitpid(child, 0)
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    result: T = value
    return result


def _answer(
    function: Callable[[], object], fd: int, uid: int, gid: int, groups: Sequence[int]
) -> None:
    """In the child: never returns."""
    try:
        if uid or gid or groups:
            os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        answer = pickle.dumps((True, function()))
    except BaseException as error:  # the parent raises it
        answer = pickle.dumps((False, error))
    with open(fd, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)


def _read_all(fd: int, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    pieces = []
    while True:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise TimeoutError
        piece = os.read(fd, 65536)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)
