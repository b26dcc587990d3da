"""What lies under a region of persistent memory, and whether it outlives a power cut.

Nothing here trusts a name or a setting: a device says in sysfs whether it is persistent memory, a
file is on persistent memory if the kernel maps it with MAP_SYNC, which only DAX file systems allow.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crailfs.errors import ConfigurationError
from crailfs.pmem.mapping import LARGE_PAGE_BYTES, SegmentMapping
from crailfs.wire.messages import FlushMethod

SYSFS: Final = Path("/sys")

_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6, 0x958458F6})
"""``f_type`` of tmpfs, ramfs and hugetlbfs, see statfs(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


class Kind(enum.Enum):
    """The value is for people."""

    DEVDAX = "devdax"
    FSDAX = "fsdax"
    FILE = "file as a stand-in (not durable)"
    """Flushed by msync all the same; but a region of this tier promises what DAX does."""
    VOLATILE_DEVICE = "devdax on volatile memory (not durable)"
    TMPFS = "file on tmpfs (not durable)"

    @property
    def is_device(self) -> bool:
        return self in (Kind.DEVDAX, Kind.VOLATILE_DEVICE)

    @property
    def durable(self) -> bool:
        return self in (Kind.DEVDAX, Kind.FSDAX)

    @property
    def flush_method(self) -> FlushMethod:
        return FlushMethod.MAPPING if self is Kind.FILE else FlushMethod.CACHE_LINES


@dataclass(frozen=True)
class Place:
    kind: Kind
    size_bytes: int
    """Of the device or file."""
    numa_node: int
    """-1: none is known."""


def examine(path: Path, fd: int, sysfs: Path = SYSFS) -> Place:
    """Of an open file or device. Raises ``ConfigurationError`` for anything else and for a device
    whose mappings must be aligned to more than 2 MiB."""
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode):
        device = (sysfs / "dev/char" / _numbers(status.st_rdev)).resolve()
        if (device / "subsystem").resolve().name == "dax":
            return _examine_device(path, device)
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(
            f"region {path} is neither a file nor a DAX device: name one of those (/dev/dax0.0), "
            "not the block device of persistent memory"
        )
    if in_memory(fd):
        kind = Kind.TMPFS
    elif _maps_synchronously(fd, status.st_size):
        kind = Kind.FSDAX
    else:
        kind = Kind.FILE
    block_device = (sysfs / "dev/block" / _numbers(status.st_dev)).resolve()
    return Place(kind, status.st_size, _numa_node(block_device))


def in_memory(fd: int) -> bool:
    """Whether the file (or directory) is lost with the host's memory."""
    answer = (ctypes.c_long * 64)()  # struct statfs, which begins with f_type
    if _libc.fstatfs(fd, answer) != 0:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))
    return answer[0] in _IN_MEMORY


def _examine_device(path: Path, device: Path) -> Place:
    size_bytes = int((device / "size").read_text())
    alignment_file = device / "align"
    alignment = int(alignment_file.read_text()) if alignment_file.exists() else LARGE_PAGE_BYTES
    if LARGE_PAGE_BYTES % alignment:
        raise ConfigurationError(
            f"region {path}: the device is mapped in pieces of {alignment} bytes; make its "
            f"namespace anew with an alignment of 2 MiB (ndctl create-namespace --align 2M)"
        )
    # Memory that is merely set aside has DAX devices too; those of NVDIMMs hang on an nvdimm bus.
    persistent = any(part.startswith("ndbus") for part in device.parts)
    kind = Kind.DEVDAX if persistent else Kind.VOLATILE_DEVICE
    return Place(kind, size_bytes, _numa_node(device))


def _maps_synchronously(fd: int, size_bytes: int) -> bool:
    if size_bytes == 0:
        return False
    try:
        SegmentMapping(fd, [0], LARGE_PAGE_BYTES, min(size_bytes, 1), synchronous=True)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def _numa_node(device: Path) -> int:
    """The node is noted at the device or at one of those that it hangs on."""
    for directory in (device, *device.parents):
        noted = directory / "numa_node"
        if noted.exists() and (node := int(noted.read_text())) >= 0:
            return node
    return -1


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
