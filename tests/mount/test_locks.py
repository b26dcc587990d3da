"""flock and fcntl locks between processes of one host: kept by the kernel, per mount."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.mounts import in_child


def refused(lock: Callable[[int], object], path: Path) -> bool:
    """Whether another process is refused that lock at once."""

    def attempt() -> bool:
        fd = os.open(path, os.O_RDWR)
        try:
            lock(fd)
        except OSError as error:
            assert error.errno in (errno.EAGAIN, errno.EACCES), error
            return True
        return False

    return in_child(attempt)


def flock_exclusive(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flock_shared(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_flock_excludes_and_is_released_by_close(place: Path) -> None:
    path = place / "file"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    flock_exclusive(fd)
    assert refused(flock_exclusive, path)
    assert refused(flock_shared, path)
    flock_shared(fd)
    assert not refused(flock_shared, path)
    assert refused(flock_exclusive, path)
    os.close(fd)
    assert not refused(flock_exclusive, path)


def test_fcntl_locks_exclude_by_range_and_are_released_by_unlock(place: Path) -> None:
    path = place / "file"
    path.write_bytes(bytes(100))

    def lock(start: int, count: int) -> Callable[[int], object]:
        return lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, count, start)

    fd = os.open(path, os.O_RDWR)
    try:
        lock(10, 10)(fd)
        assert refused(lock(19, 1), path)
        assert not refused(lock(20, 5), path)
        fcntl.lockf(fd, fcntl.LOCK_UN, 5, 10)
        assert not refused(lock(10, 5), path)
        assert refused(lock(15, 5), path)
    finally:
        os.close(fd)
    assert not refused(lock(0, 100), path)


def test_a_blocked_lock_waits_and_holds_up_nobody_else(place: Path) -> None:
    path = place / "file"
    path.touch()
    # Both opened anew: a lock belongs to an open file, which a fork shares.
    script = f"""
import fcntl, os
fd = os.open({str(path)!r}, os.O_RDWR)
print("waiting", flush=True)
fcntl.flock(fd, fcntl.LOCK_EX)
print("locked", flush=True)
"""
    fd = os.open(path, os.O_RDWR)
    flock_exclusive(fd)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as waiter:
        try:
            assert waiter.stdout is not None
            assert waiter.stdout.readline() == b"waiting\n"
            for name in map(str, range(20)):
                (place / name).write_bytes(b"the mount still serves")
            assert waiter.poll() is None
            os.close(fd)
            assert waiter.stdout.readline() == b"locked\n"
        finally:
            waiter.kill()
