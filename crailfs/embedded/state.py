"""The state directory of an embedded file system: what lies where in it, and who has it.

STATE/crail.toml        the configuration that every process of it reads
STATE/secret            the cluster's secret, mode 0600
STATE/metadata/         LMDB and journal
STATE/storage/          the storage server's identity and life lines
STATE/disk.region       the disk tier
STATE/log/*.log         one per process, bounded
STATE/supervisor.pid    locked by the supervisor for as long as it lives
STATE/up.json           what runs: see ``Running``
STATE/*.sock            the servers' Unix sockets
/dev/shm/crailfs-<cluster id>.region    the memory tier
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import struct
from pathlib import Path
from typing import Final

import msgspec

from crailfs.config_file import Settings
from crailfs.config_values import UNIX_PATH_MAX_BYTES
from crailfs.embedded.process_identity import ProcessIdentity
from crailfs.embedded.sizes import SHARED_MEMORY, Sizes
from crailfs.errors import BusyError, ConfigurationError
from crailfs.records import Tier

_FLOCK: Final = struct.Struct("hhqqi0q")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""
_WHOLE_FILE: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_SOCKET_NAMES: Final = ("metadata.sock", "storage.sock")


class RunningProcess(msgspec.Struct):
    identity: ProcessIdentity | None
    """None: not running just now; the supervisor starts it again."""
    ready: tuple[str, ...]
    """Where it is reached; empty until it is ready."""
    restart_count: int


class Running(msgspec.Struct):
    """``up.json``: what the supervisor has started."""

    mountpoint: str
    supervisor: ProcessIdentity
    processes: dict[str, RunningProcess]


class State:
    """One state directory. Making the object touches nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.config_file = self.directory / "crail.toml"
        self.secret_file = self.directory / "secret"
        self.log_directory = self.directory / "log"
        self.disk_region = self.directory / "disk.region"
        self._pid_file = self.directory / "supervisor.pid"
        self._up_file = self.directory / "up.json"

    @property
    def exists(self) -> bool:
        return self.config_file.exists()

    def settings(self) -> Settings:
        """Of its own ``crail.toml`` alone: the environment speaks of other file systems."""
        return Settings.load(self.config_file, environment={})

    def regions(self) -> dict[Tier, tuple[Path, int]]:
        """Path and size in bytes of each tier."""
        return {each.tier: (each.path, each.size_bytes) for each in self.settings().regions()}

    def create(self, sizes: Sizes) -> None:
        """Make the directory and write a new file system's configuration and secret.

        Raises:
            ConfigurationError: the path is too long for its sockets, or holds something else.
        """
        longest = max(len(os.fsencode(self.directory / name)) for name in _SOCKET_NAMES)
        if longest > UNIX_PATH_MAX_BYTES:
            raise ConfigurationError(
                f"{self.directory}: the path is too long for a Unix socket in it by "
                f"{longest - UNIX_PATH_MAX_BYTES} bytes: name a shorter one with --state"
            )
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigurationError(
                f"{self.directory} is not a directory: name another with --state"
            ) from None
        if any(self.directory.iterdir()):
            raise ConfigurationError(
                f"{self.directory} is not empty and holds no crail.toml: name another with --state"
            )
        self.directory.chmod(0o700)
        cluster_id = secrets.token_hex(16)
        _write_private(self.secret_file, secrets.token_hex(32) + "\n")
        text = _configuration(self, cluster_id, sizes)
        # Last, and in one step: a directory with a crail.toml is complete.
        _write_private(self.config_file.with_suffix(".new"), text)
        self.config_file.with_suffix(".new").rename(self.config_file)

    def lock(self) -> int:
        """Take the directory for this process as long as it lives; the descriptor that holds it.

        Raises:
            BusyError: names the process that has it.
        """
        # A lock of the open file, not of the process (which any close of the file would drop).
        fd = os.open(self._pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except (BlockingIOError, PermissionError):
            os.close(fd)
            raise BusyError(
                f"the state directory {self.directory} is in use by pid {self.locked_by()}: "
                "stop it with `crail down`, or name another with --state"
            ) from None
        os.pwrite(fd, f"{os.getpid():<19}\n".encode(), 0)
        return fd

    def locked_by(self) -> int | None:
        """The pid of the supervisor that has the directory, without taking it for an instant."""
        try:
            fd = os.open(self._pid_file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE))
            return None if answer[0] == fcntl.F_UNLCK else int(os.pread(fd, 20, 0) or b"0")
        finally:
            os.close(fd)

    def write_running(self, running: Running) -> None:
        new = self._up_file.with_suffix(".new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(running)) + b"\n")
        new.rename(self._up_file)

    def read_running(self) -> Running | None:
        """What the last supervisor wrote; None: nothing was left running."""
        try:
            return msgspec.json.decode(self._up_file.read_bytes(), type=Running)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ConfigurationError(
                f"{self._up_file}: not readable ({error}): end the processes of "
                f"{self.directory} by hand and remove it"
            ) from error

    def clear_running(self) -> None:
        for name in ("up.json", *_SOCKET_NAMES):
            (self.directory / name).unlink(missing_ok=True)

    def destroy(self) -> None:
        """Remove every region and the directory. Nothing of it may be running."""
        if self.exists:
            for path, _ in self.regions().values():
                path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)


def _write_private(path: Path, text: str) -> None:
    """A file that nobody but its owner can read, at any instant."""
    fd = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR
    )
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _configuration(state: State, cluster_id: str, sizes: Sizes) -> str:
    def quoted(value: object) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    def listen(name: str) -> str:
        return f"[{quoted(f'unix:{state.directory / name}')}, {quoted('127.0.0.1:0')}]"

    regions = []
    if sizes.memory_bytes:
        path = SHARED_MEMORY / f"crailfs-{cluster_id}.region"
        regions.append(("memory", path, sizes.memory_bytes))
    if sizes.disk_bytes:
        regions.append(("disk", state.disk_region, sizes.disk_bytes))
    header = f"""\
# Written by `crail up`. Sizes cannot be changed once the file system exists.
[cluster]
id = {quoted(cluster_id)}
secret_file = {quoted(state.secret_file)}
metadata = {quoted(f"unix:{state.directory / 'metadata.sock'}")}

[metadata]
state = {quoted(state.directory / "metadata")}
listen = {listen("metadata.sock")}

[storage]
state = {quoted(state.directory / "storage")}
listen = {listen("storage.sock")}
"""
    tables = (
        f"\n[[storage.region]]\ntier = {quoted(tier)}\npath = {quoted(path)}\nsize = {size_bytes}\n"
        for tier, path, size_bytes in regions
    )
    return header + "".join(tables)
