"""A temporary place with file systems started in it, that leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from crailfs.embedded.state import State
from crailfs.errors import CrailError

_UP_TIMEOUT_SECONDS: Final = 60.0
_DOWN_TIMEOUT_SECONDS: Final = 120.0
_COMPILE_TIMEOUT_SECONDS: Final = 60.0
_END_TIMEOUT_SECONDS: Final = 10.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CHECKOUT: Final = Path(__file__).resolve().parents[2]
_REFERENCE_SOURCE: Final = "usr/share/doc/libfuse3-dev/examples/passthrough_ll.c"
_REPORTED_LINES: Final = 12


class Workbench:
    """A directory on disk, one on tmpfs, and file systems mounted below the former.

    Use it as a context manager. Its end takes down whatever was started, by force where it does
    not go by itself, removes both directories, and raises if something stays all the same.
    """

    def __init__(self, purpose: str) -> None:
        # Not TMPDIR: that may be a tmpfs, and this is for what must lie on a disk.
        self.directory = Path(tempfile.mkdtemp(prefix=f"crail-{purpose}-", dir="/var/tmp"))
        self.shared_memory = Path(tempfile.mkdtemp(prefix=f"crail-{purpose}-", dir="/dev/shm"))
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir()
        self.mountpoint = self.directory / "crail"
        self.state = State(self.directory / "state")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._kept = False

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            return
        with signals_ignored():
            self.take_down()

    def keep(self) -> None:
        """Leave everything as it is at the end."""
        self._kept = True

    @property
    def environment(self) -> dict[str, str]:
        """For everything started here. Each process shows by it that it is ours."""
        return {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "CRAIL_STATE_HOME": str(self.directory / "home"),
        }

    def crail(self, *arguments: str, timeout_seconds: float) -> str:
        """Run one ``crail`` command; what it printed.

        Raises:
            CrailError: it failed, or did not end in time.
        """
        command = [sys.executable, "-m", "crailfs.cli.main", *arguments]
        return self.run(command, f"crail {arguments[0]}", timeout_seconds)

    def run(self, command: Sequence[str], what: str, timeout_seconds: float) -> str:
        """Run one command to its end, out of the reach of a terminal's signals."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
                cwd=_CHECKOUT,
                env=self.environment,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise CrailError(f"{what} has not ended within {timeout_seconds:.0f} s") from None
        if done.returncode != 0:
            raise CrailError(
                f"{what} failed with exit code {done.returncode}: {last_lines(done.stderr)}"
            )
        return done.stdout

    def start(
        self, command: Sequence[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process that is ended with the workbench, and all that it starts with it. What it
        prints to standard output is a pipe; the rest goes to ``log``."""
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=_CHECKOUT,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a process of ``start`` that has closed its output; what it left is ended."""
        _end_group(process, wait_first=True)
        self._processes.remove(process)

    def start_crail(self, *arguments: str) -> str:
        """``crail up`` at ``mountpoint``, for the first time or again; what it said."""
        self.mountpoint.mkdir(exist_ok=True)
        return self.crail(
            "up",
            str(self.mountpoint),
            "--state",
            str(self.state.directory),
            *arguments,
            timeout_seconds=_UP_TIMEOUT_SECONDS,
        )

    def start_c_reference(self, source: Path) -> Path:
        """Mount libfuse's own ``passthrough_ll.c`` over ``source``; the mount point."""
        program = self._compile_reference()
        mountpoint = self.directory / "c-reference"
        mountpoint.mkdir()
        process = self.start(
            [str(program), "-f", "-o", f"source={source}", str(mountpoint)],
            self.directory / "c-reference.log",
            self.environment,
        )
        # It keeps a descriptor for each file that the kernel knows.
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
        deadline = time.monotonic() + _END_TIMEOUT_SECONDS
        while mountpoint not in _mountpoints():
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "c-reference.log").read_text(errors="replace")
                raise CrailError(f"the C reference did not mount: {last_lines(log)}")
            time.sleep(0.02)
        return mountpoint

    def _compile_reference(self) -> Path:
        source = Path("/", _REFERENCE_SOURCE)
        if not source.exists():
            # Slim images leave documentation out when they install a package.
            fetch = f"cd {self.temporary} && apt-get download -q libfuse3-dev"
            unpack = f"dpkg-deb --extract {self.temporary}/libfuse3-dev_*.deb {self.temporary}"
            self.run(
                ["sh", "-c", f"{fetch} && {unpack}"],
                "fetching libfuse3-dev",
                _COMPILE_TIMEOUT_SECONDS,
            )
            source = self.temporary / _REFERENCE_SOURCE
        program = self.temporary / "passthrough_ll"
        compile_it = f"gcc -O2 -o {program} {source} $(pkg-config --cflags --libs fuse3)"
        self.run(["sh", "-c", compile_it], "compiling passthrough_ll.c", _COMPILE_TIMEOUT_SECONDS)
        return program

    def take_down(self) -> None:
        """End and remove everything.

        Raises:
            CrailError: names what could not be removed.
        """
        troubles: list[str] = []

        def attempt(step: Callable[[], object]) -> None:
            # Every step is tried, whatever became of the one before it.
            try:
                step()
            except (CrailError, OSError) as error:
                troubles.append(str(error))

        regions = self._memory_regions()
        for process in reversed(self._processes):
            attempt(functools.partial(_end_group, process))
        if self.state.exists:
            attempt(self._stop_crail)
        for mountpoint, device in self._mounts():
            attempt(functools.partial(_force_unmount, mountpoint, device))
        attempt(self._kill_processes)
        if not self._mounts():
            attempt(functools.partial(shutil.rmtree, self.directory))
            attempt(functools.partial(shutil.rmtree, self.shared_memory))
        for region in regions:
            region.unlink(missing_ok=True)
        left = [f"mount {mount}" for mount, _ in self._mounts()]
        left += [f"process {pid}" for pid in self._pids()]
        left += [str(path) for path in (self.directory, self.shared_memory) if path.exists()]
        if left:
            raise CrailError(f"left behind: {', '.join(left)}; {'; '.join(troubles)}")

    def _stop_crail(self) -> None:
        self.crail(
            "down",
            str(self.mountpoint),
            "--state",
            str(self.state.directory),
            "--force",
            "--destroy",
            timeout_seconds=_DOWN_TIMEOUT_SECONDS,
        )

    def _memory_regions(self) -> list[Path]:
        if not self.state.exists:
            return []
        return [path for path, _ in self.state.regions().values()]

    def _mounts(self) -> list[tuple[Path, str]]:
        """Mount points below the workbench and their devices."""
        return [
            (path, dev) for path, dev in _mountpoints().items() if self.directory in path.parents
        ]

    def _pids(self) -> list[int]:
        """Processes that were started with this workbench's environment."""
        mark = f"TMPDIR={self.temporary}".encode()
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended meanwhile, or somebody else's
            if mark in environment.split(b"\0") and int(name) != os.getpid():
                found.append(int(name))
        return found

    def _kill_processes(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _END_TIMEOUT_SECONDS
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._pids() and time.monotonic() < deadline:
                time.sleep(0.05)


def last_lines(text: str) -> str:
    """The end of a program's output, for an error message."""
    return "\n".join(text.strip().splitlines()[-_REPORTED_LINES:])


def raise_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise ``KeyboardInterrupt``, once: what cleans up
    after it is not interrupted again."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in _SIGNALS:
        # Started under nohup, we are to outlive the terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mountpoints() -> dict[Path, str]:
    """Of all mounts that this process sees, with their device (``major:minor``)."""
    fields = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {Path(field[4]): field[2] for field in fields}


def _force_unmount(mountpoint: Path, device: str) -> None:
    """Nothing here looks into the mount: it may not answer."""
    with contextlib.suppress(FileNotFoundError):
        Path("/sys/fs/fuse/connections", device.partition(":")[2], "abort").write_text("1")
    root = os.geteuid() == 0
    command = ["umount", "--lazy"] if root else ["fusermount3", "-u", "-z"]
    subprocess.run(
        [*command, str(mountpoint)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_END_TIMEOUT_SECONDS,
        check=False,
    )


def _end_group(process: subprocess.Popen[bytes], *, wait_first: bool = False) -> None:
    """The process and all of its session."""
    if wait_first:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        break
    if process.stdout is not None:
        process.stdout.close()
