"""One file system action on a directory tree, by system calls, with a comparable outcome.

The same action is done below two roots; whatever a program could notice of it has to be equal.
Left out of the comparison, because file systems are free to differ there: inode and device
numbers, a directory's size, ``st_blocks``, and times that the action set to "now".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

AT_FDCWD = -100
LIBC = ctypes.CDLL(None, use_errno=True)

AGED_NS = 1_000_000_000_123_456_789
"""A modification time that only ``age`` sets: seeing it again means nothing touched the file."""


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """The effective user for the system calls within; 0 stays root."""
    if uid == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([uid + 1])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def describe(path: str) -> tuple[Any, ...]:
    """What ``lstat`` shows of ``path`` that any two file systems have to agree on."""
    info = os.lstat(path)
    return describe_stat(info)


def describe_stat(info: os.stat_result) -> tuple[Any, ...]:
    is_directory = stat.S_ISDIR(info.st_mode)
    return (
        oct(info.st_mode),
        info.st_uid,
        info.st_gid,
        info.st_nlink,
        None if is_directory else info.st_size,
        info.st_rdev,
        info.st_mtime_ns == AGED_NS,
    )


def outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    """``("ok", value)`` or ``("error", errno name)``."""
    try:
        return "ok", action()
    except OSError as error:
        return "error", errno.errorcode.get(error.errno or 0, error.errno)


class Tree:
    """Actions below ``root``; paths are relative to it, open files are numbered slots."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files: dict[int, int] = {}

    def path(self, relative: str) -> str:
        return os.path.join(self.root, relative)

    def close_all(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()

    # --- by path --------------------------------------------------------------------------------

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.path(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.path(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.path(path))

    def rename(self, old: str, new: str, flags: int) -> None:
        result = LIBC.renameat2(
            AT_FDCWD, self.path(old).encode(), AT_FDCWD, self.path(new).encode(), flags
        )
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def link(self, old: str, new: str) -> None:
        os.link(self.path(old), self.path(new), follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.path(path))

    def readlink(self, path: str) -> str:
        return os.readlink(self.path(path))

    def mknod(self, path: str, mode: int) -> None:
        os.mknod(self.path(path), mode)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.path(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(self.path(path), uid, gid)

    def age(self, path: str) -> None:
        os.utime(self.path(path), ns=(AGED_NS, AGED_NS), follow_symlinks=False)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.path(path), size)

    def write_file(self, path: str, flags: int, offset: int, data: bytes) -> int:
        descriptor = os.open(self.path(path), flags, 0o640)
        try:
            return os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)

    def read_file(self, path: str) -> bytes:
        descriptor = os.open(self.path(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return b"not a regular file"
            parts = []
            while part := os.read(descriptor, 1 << 17):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.path(path)))

    def stat(self, path: str) -> tuple[Any, ...]:
        return describe_stat(os.stat(self.path(path)))

    def lstat(self, path: str) -> tuple[Any, ...]:
        return describe(self.path(path))

    def access(self, path: str, mode: int) -> bool:
        return os.access(self.path(path), mode, effective_ids=True)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.path(path), name, value, flags)

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(self.path(path), name)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.path(path), name)

    # --- by open file ---------------------------------------------------------------------------

    def open(self, slot: int, path: str, flags: int) -> None:
        descriptor = os.open(self.path(path), flags | os.O_NONBLOCK, 0o644)
        if slot in self.files:
            os.close(self.files[slot])
        self.files[slot] = descriptor

    def close(self, slot: int) -> None:
        os.close(self.files.pop(slot))

    def pwrite(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.files[slot], data, offset)

    def pread(self, slot: int, offset: int, byte_count: int) -> bytes:
        return os.pread(self.files[slot], byte_count, offset)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fstat(self, slot: int) -> tuple[Any, ...]:
        return describe_stat(os.fstat(self.files[slot]))

    def fsync(self, slot: int) -> None:
        os.fsync(self.files[slot])

    def map_and_store(self, slot: int, offset: int, data: bytes) -> None:
        """Change bytes through a shared mapping; nothing where the file is too short for it."""
        info = os.fstat(self.files[slot])
        size = info.st_size
        if not stat.S_ISREG(info.st_mode) or size == 0 or offset + len(data) > size:
            return
        try:
            mapping = mmap.mmap(self.files[slot], size, mmap.MAP_SHARED)
        except ValueError:
            return
        with mapping:
            mapping[offset : offset + len(data)] = data
            mapping.flush()

    # --- everything -----------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Every node below the root, with its metadata, bytes, target and attributes."""
        found: dict[str, Any] = {}
        pending = [""]
        while pending:
            directory = pending.pop()
            for name in sorted(os.listdir(self.path(directory))):
                relative = os.path.join(directory, name)
                path = self.path(relative)
                info = os.lstat(path)
                content: Any = None
                if stat.S_ISDIR(info.st_mode):
                    pending.append(relative)
                elif stat.S_ISREG(info.st_mode):
                    with open(path, "rb") as file:
                        content = file.read()
                elif stat.S_ISLNK(info.st_mode):
                    content = os.readlink(path)
                attributes = sorted(
                    (key, os.getxattr(path, key, follow_symlinks=False))
                    for key in os.listxattr(path, follow_symlinks=False)
                    if not key.startswith(("user.crail.", "security.", "system."))
                )
                found[relative] = (describe_stat(info), content, attributes)
        return found
