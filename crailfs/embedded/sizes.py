"""How large the tiers of an embedded file system are when nobody says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final, NamedTuple

from crailfs.errors import ConfigurationError
from crailfs.units import GIB, MIB, format_bytes

SHARED_MEMORY: Final = Path("/dev/shm")
TIER_MIN_BYTES: Final = 16 * MIB
DISK_RESERVE_SHARE: Final = 20
"""One part in so many of the file system stays free for everybody else, and at least"""
DISK_RESERVE_MIN_BYTES: Final = 1 * GIB


class Sizes(NamedTuple):
    memory_bytes: int
    disk_bytes: int
    memory_reason: str
    disk_reason: str
    """Where each size comes from, for people."""


class Machine(NamedTuple):
    """What there is, in bytes."""

    memory_available_bytes: int
    shared_memory_free_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int

    @classmethod
    def here(cls, directory: Path) -> Machine:
        """This host's memory and the file system that holds (or will hold) ``directory``."""
        while not directory.exists():
            directory = directory.parent
        disk = os.statvfs(directory)
        shared_free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
        return cls(
            memory_available_bytes=min(_memory_available_bytes(), _memory_limit_left_bytes()),
            shared_memory_free_bytes=shared_free,
            disk_total_bytes=disk.f_blocks * disk.f_frsize,
            disk_free_bytes=disk.f_bavail * disk.f_frsize,
        )


def choose_sizes(machine: Machine, memory_bytes: int | None, disk_bytes: int | None) -> Sizes:
    """The sizes asked for (0: no such tier), or for None what suits the machine, in whole MiB.

    Raises:
        ConfigurationError: more than there is, too small to be of use, or no tier at all.
    """
    reserve_bytes = max(DISK_RESERVE_MIN_BYTES, machine.disk_total_bytes // DISK_RESERVE_SHARE)
    memory_reason, disk_reason = "as asked", "as asked"
    if memory_bytes is None:
        quarter_bytes = machine.memory_available_bytes // 4
        half_bytes = machine.shared_memory_free_bytes // 2
        memory_bytes = _whole_mib(min(quarter_bytes, half_bytes))
        memory_reason = (
            f"a quarter of the {format_bytes(machine.memory_available_bytes)} of available memory"
            if quarter_bytes <= half_bytes
            else f"half of the {format_bytes(machine.shared_memory_free_bytes)} free in /dev/shm"
        )
        memory_bytes = memory_bytes if memory_bytes >= TIER_MIN_BYTES else 0
    elif memory_bytes > min(machine.shared_memory_free_bytes, machine.memory_available_bytes):
        raise ConfigurationError(
            f"--memory {format_bytes(memory_bytes)}: more than there is "
            f"({format_bytes(machine.memory_available_bytes)} of memory available, "
            f"{format_bytes(machine.shared_memory_free_bytes)} free in {SHARED_MEMORY}): ask for "
            "less"
        )
    if disk_bytes is None:
        disk_bytes = _whole_mib(max(0, machine.disk_free_bytes - reserve_bytes) // 4)
        disk_bytes = disk_bytes if disk_bytes >= TIER_MIN_BYTES else 0
        disk_reason = (
            f"a quarter of the {format_bytes(machine.disk_free_bytes)} free on the state "
            f"directory's disk, less a reserve of {format_bytes(reserve_bytes)}"
        )
    elif disk_bytes > machine.disk_free_bytes:
        raise ConfigurationError(
            f"--disk {format_bytes(disk_bytes)}: more than the "
            f"{format_bytes(machine.disk_free_bytes)} free on the state directory's disk: ask for "
            "less, or name a state directory elsewhere with --state"
        )
    for option, size_bytes in (("--memory", memory_bytes), ("--disk", disk_bytes)):
        if 0 < size_bytes < TIER_MIN_BYTES:
            raise ConfigurationError(
                f"{option}: {format_bytes(size_bytes)} is too little: at least "
                f"{format_bytes(TIER_MIN_BYTES)}, or 0 for no such tier"
            )
    if not memory_bytes and not disk_bytes:
        raise ConfigurationError(
            "a file system needs memory or disk, and too little of both is free here: say --memory "
            "or --disk, or name a state directory elsewhere with --state"
        )
    return Sizes(_whole_mib(memory_bytes), _whole_mib(disk_bytes), memory_reason, disk_reason)


def _whole_mib(size_bytes: int) -> int:
    return size_bytes // MIB * MIB


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ConfigurationError("/proc/meminfo names no MemAvailable: say --memory SIZE")


def _memory_limit_left_bytes() -> int:
    """What the control group (a container, a systemd slice) still leaves us; huge: no limit."""
    unlimited = 1 << 62
    group = next(
        (
            line.removeprefix("0::").lstrip("/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        ),
        None,
    )
    if group is None:
        return unlimited
    directory = Path("/sys/fs/cgroup") / group
    try:
        limit = (directory / "memory.max").read_text().strip()
        used_bytes = int((directory / "memory.current").read_text())
    except FileNotFoundError:
        return unlimited
    return unlimited if limit == "max" else max(0, int(limit) - used_bytes)
