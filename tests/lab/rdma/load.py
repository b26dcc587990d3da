"""Files written and read while the network, or the other host's server, is not there."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crailfs.units import MIB

FILE_BYTES = MIB


def content(seed: int, byte_count: int) -> bytes:
    """Different everywhere, and cheap to make."""
    block = random.Random(seed).randbytes(MIB)
    pieces = [block[at % MIB :] + block[: at % MIB] for at in range(0, byte_count, MIB)]
    stamped = (at.to_bytes(8) + piece[8:] for at, piece in enumerate(pieces))
    return b"".join(stamped)[:byte_count]


class Load:
    """Writes files one after the other in one thread, and in another reads back those that are
    complete, not from the kernel's cache. An OSError of the writer ends it unless
    ``may_fail``: then it goes on with the next file."""

    def __init__(self, directory: Path, *, may_fail: bool = False) -> None:
        self.directory = directory
        self.done = 0
        """Files that were written, or given up."""
        self.reads = 0
        self.longest_s = 0.0
        """Writing one file."""
        self.longest_read_s = 0.0
        self.given_up: dict[int, int] = {}
        """Files of which a system call failed, and its errno."""
        self.failed_reads: list[int] = []
        """Their errnos."""
        self.failure: BaseException | None = None
        self._may_fail = may_fail
        self._ending = threading.Event()
        # A thread that hangs in the kernel must not keep the test run from its end.
        self._threads = [
            threading.Thread(target=self._work, args=(step,), daemon=True)
            for step in (self._write, self._read)
        ]

    def __enter__(self) -> Load:
        self.directory.mkdir()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Afterwards no file is touched any more."""
        self._ending.set()
        deadline_s = time.monotonic() + 120
        for thread in self._threads:
            thread.join(max(0, deadline_s - time.monotonic()))
            assert not thread.is_alive(), "a system call hangs"

    def wait_for(self, count: int, timeout_s: float = 90) -> None:
        """Until ``count`` files are done, and one was read since this was called."""
        deadline_s = time.monotonic() + timeout_s
        reads = self.reads
        while (self.done < count or self.reads == reads) and self.failure is None:
            assert time.monotonic() < deadline_s, f"stuck after {self.done} files"
            time.sleep(0.05)
        assert self.failure is None, self.failure

    def check(self) -> None:
        """Every file has what was written to it; one that was given up may have less of it."""
        self.stop()
        assert self.failure is None, self.failure
        for index in range(self.done):
            expected = content(index, FILE_BYTES)
            if index not in self.given_up:
                assert self.path(index).read_bytes() == expected, index
            elif self.path(index).exists():
                assert expected.startswith(self.path(index).read_bytes()), index

    @property
    def errors(self) -> set[str]:
        """What system calls failed with."""
        return {errno.errorcode[number] for number in [*self.given_up.values(), *self.failed_reads]}

    def path(self, index: int) -> Path:
        return self.directory / str(index)

    def _work(self, step: Callable[[], None]) -> None:
        try:
            while not self._ending.is_set():
                step()
        except BaseException as error:
            self.failure = error

    def _write(self) -> None:
        data = content(self.done, FILE_BYTES)
        started_s = time.monotonic()
        try:
            with self.path(self.done).open("wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
        except OSError as error:
            if not self._may_fail:
                raise
            self.given_up[self.done] = error.errno or 0
        self.longest_s = max(self.longest_s, time.monotonic() - started_s)
        self.done += 1

    def _read(self) -> None:
        whole = [index for index in range(self.done) if index not in self.given_up]
        if not whole:
            time.sleep(0.05)
            return
        index = whole[self.reads % len(whole)]
        started_s = time.monotonic()
        try:
            with self.path(index).open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == content(index, FILE_BYTES), index
        except OSError as error:
            if not self._may_fail:
                raise
            self.failed_reads.append(error.errno or 0)
        self.longest_read_s = max(self.longest_read_s, time.monotonic() - started_s)
        self.reads += 1

    def __str__(self) -> str:
        return (
            f"{self.done} files written, {len(self.given_up)} of them given up, longest "
            f"{self.longest_s:.1f} s; {self.reads} read, {len(self.failed_reads)} failed, longest "
            f"{self.longest_read_s:.1f} s; errors {sorted(self.errors)}"
        )


class Outage:
    """Something about the network that is wrong for a while."""

    def __init__(self, nic: str) -> None:
        self.nic = nic

    def link_down_for(self, seconds: float) -> None:
        """Returns when it is up again. A shell puts it up, not this process: a system call on a
        mount that waits for the link may stop the whole interpreter meanwhile."""
        link = f"ip link set {shlex.quote(self.nic)}"
        run("sh", "-c", f"{link} down; sleep {seconds}; {link} up", timeout_s=seconds + 200)

    @contextlib.contextmanager
    def without_rdma(self) -> Iterator[None]:
        """RoCE v2's packets (UDP port 4791) are dropped, all others pass."""
        run("tc", "qdisc", "add", "dev", self.nic, "clsact")
        try:
            match = "match ip protocol 17 0xff match ip dport 4791 0xffff action drop"
            command = f"tc filter add dev {self.nic} egress protocol ip u32 {match}"
            run(*command.split())
            yield
        finally:
            run("tc", "qdisc", "del", "dev", self.nic, "clsact")


def run(*command: str, timeout_s: float = 30) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
