"""The guest's devices for the power cuts: what outlives them, and where it is found again."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from crailfs.config import Credentials, MetadataConfig, RegionConfig, StorageConfig
from crailfs.records import Tier

STATE_MIB = 192
"""Of the NVMe disk, for the servers' own state; the rest is a region."""
SECTOR_BYTES = 512
_SECTORS_PER_MIB = (1 << 20) // SECTOR_BYTES
_BLKPG = 0x1269
_BLKPG_ADD_PARTITION = 1


class Devices(NamedTuple):
    """The servers' configuration on these devices."""

    metadata: MetadataConfig
    storage: StorageConfig


def prepare(devdax: Path, nvme: Path, state: Path) -> Devices:
    """The kernel is told of two parts of the disk, of which the disk itself knows nothing; the
    first holds a journalling file system, made once, for the servers' state at ``state``."""
    disk_sectors = int(Path(f"/sys/class/block/{nvme.name}/size").read_text())
    boundary = STATE_MIB * _SECTORS_PER_MIB
    parts = [(_SECTORS_PER_MIB, boundary), (boundary, disk_sectors)]
    for number, (first, end) in enumerate(parts, 1):
        if not Path(f"{nvme}p{number}").exists():
            add_part(nvme, number, first * SECTOR_BYTES, (end - first) * SECTOR_BYTES)
    state.mkdir(exist_ok=True)
    if not os.path.ismount(state):
        if subprocess.run(["blkid", f"{nvme}p1"], check=False, capture_output=True).returncode:
            _run("mkfs.ext4", "-q", f"{nvme}p1")
        _run("mount", f"{nvme}p1", str(state))
    address = "unix:/run/metadata.sock"
    credentials = Credentials(cluster_id=b"", secret=b"the secret of a test cluster")
    return Devices(
        MetadataConfig(state=state / "metadata", listen=(address,), credentials=credentials),
        StorageConfig(
            state=state / "storage",
            metadata=address,
            listen=("unix:/run/storage.sock", "127.0.0.1:0"),
            regions=(
                RegionConfig(tier=Tier.PMEM, path=devdax, size_bytes=0),
                RegionConfig(tier=Tier.NVME, path=Path(f"{nvme}p2"), size_bytes=0),
            ),
            credentials=credentials,
        ),
    )


class _Partition(ctypes.Structure):
    """``struct blkpg_partition`` of linux/blkpg.h; bytes."""

    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("number", ctypes.c_int),
        ("names", ctypes.c_char * 128),
    )


class _Request(ctypes.Structure):
    """``struct blkpg_ioctl_arg``."""

    _fields_ = (
        ("operation", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("length", ctypes.c_int),
        ("partition", ctypes.POINTER(_Partition)),
    )


def add_part(disk: Path, number: int, start: int, length: int) -> None:
    """The kernel shows these bytes of the disk as a device of its own; the disk is not changed."""
    partition = _Partition(start, length, number)
    size = ctypes.sizeof(partition)
    request = _Request(_BLKPG_ADD_PARTITION, 0, size, ctypes.pointer(partition))
    descriptor = os.open(disk, os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, _BLKPG, request)
    finally:
        os.close(descriptor)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
