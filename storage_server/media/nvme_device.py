"""A whole block device as a region: what may be overwritten, sizes, and discard.

The device is opened exclusively, so that the kernel refuses to mount it, to make it part of a RAID
or of a volume group, and to lend it to a second server, for as long as it is served.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

from crailfs.config import RegionConfig
from crailfs.device_io import ALIGNMENT_BYTES
from crailfs.errors import BusyError, ConfigurationError, DamagedError
from crailfs.units import MIB, format_bytes
from storage_server.media.region_file import RegionFile, check_fits, new_superblock
from storage_server.media.superblock import (
    copies_there,
    read_superblock,
    write_superblock,
)

log = logging.getLogger(__name__)

_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_RANGE: Final = struct.Struct("=QQ")
_SIGNATURES_AT_END_BYTES: Final = 1 * MIB
"""Backup partition tables and RAID superblocks lie there."""
_PROBE_TIMEOUT_S: Final = 60
_BLKID_NOTHING_FOUND: Final = 2


def open_device(
    config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int, known_uuid: bytes | None
) -> RegionFile:
    """The region on the device at ``config.path``, made if there is none and nothing else either.

    Raises as ``region_file.open_region_file`` does; ``BusyError`` too for a device that is in use,
    or that holds something and ``config.overwrite`` is not set.
    """
    path = config.path
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(
                f"region {path}: the device is in use: mounted, part of a RAID or volume group, or "
                "served by another storage server. Free it, or name another device"
            ) from error
        raise ConfigurationError(
            f"region {path}: the device cannot be opened: {error.strerror}. This user must be able "
            "to read and write it (group disk)"
        ) from error
    try:
        _check_sectors(fd, path)
        if not _is_recognized(fd, config, known_uuid):
            _format(fd, config, cluster_id, block_size_bytes)
        superblock = read_superblock(fd, path)
        check_fits(config, superblock, cluster_id, block_size_bytes, known_uuid)
        return RegionFile(
            path, fd, os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), superblock
        )
    except BaseException:
        os.close(fd)
        raise


def can_discard(fd: int) -> bool:
    """Whether the device at ``fd`` takes discards."""
    device = os.fstat(fd).st_rdev
    queue = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/discard_max_bytes"
    try:
        return int(Path(queue).read_text(encoding="ascii")) > 0
    except FileNotFoundError:  # a partition: the queue is its device's
        parent = Path(queue).parent.parent / ".." / "queue" / "discard_max_bytes"
        return parent.exists() and int(parent.read_text(encoding="ascii")) > 0


def discard(fd: int, position: int, byte_count: int) -> None:
    """Nobody needs these bytes any more; what a read of them gives is undefined. Waits."""
    fcntl.ioctl(fd, _BLKDISCARD, _RANGE.pack(position, byte_count))


def _check_sectors(fd: int, path: Path) -> None:
    (sector_bytes,) = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    if ALIGNMENT_BYTES % sector_bytes:
        raise ConfigurationError(
            f"region {path}: the device has sectors of {sector_bytes} bytes; at most "
            f"{ALIGNMENT_BYTES} can be used. Format it with smaller ones (nvme format --lbaf)"
        )


def _is_recognized(fd: int, config: RegionConfig, known_uuid: bytes | None) -> bool:
    """Whether a region is there, be it one that is to be refused with a reason of its own. False: a
    new one may be made."""
    path = config.path
    copies = copies_there(fd)
    if any(copies):
        if not copies[0] and not config.overwrite:
            # What is made in its place, a file system for one, often leaves the second copy behind.
            _check_empty(path)
        if config.overwrite and known_uuid is None:
            try:
                read_superblock(fd, path)
            except DamagedError as error:
                log.warning("region %s is overwritten as configured: %s", path, error.message)
                return False
        return True
    if known_uuid is not None:
        raise DamagedError(
            f"region {path} is gone from its device, although this server knows it. Put the right "
            "device there; or take the region out of the configuration and start once without it: "
            "the files that had blocks in it lose them"
        )
    if not config.overwrite:
        _check_empty(path)
    return False


def _check_empty(path: Path) -> None:
    """Raises ``BusyError`` if anything that is known is on the device."""
    found = _probe(path)
    if found:
        raise BusyError(
            f"region {path}: the device holds something ({found}); it is left as it is. Name "
            "another device, or wipe this one (wipefs), or set overwrite = true for the region"
        )


def _probe(path: Path) -> str:
    """What there is on the device, for people; empty: nothing that is known."""
    blkid = shutil.which("blkid") or shutil.which("blkid", path="/usr/sbin:/sbin")
    if blkid is None:
        raise ConfigurationError(
            f"region {path}: whether the device holds anything cannot be found out: the program "
            "blkid (package util-linux) is missing. Install it, or set overwrite = true"
        )
    answer = subprocess.run(
        [blkid, "--probe", "--output", "export", str(path)],
        capture_output=True,
        text=True,
        timeout=_PROBE_TIMEOUT_S,
        check=False,
    )
    if answer.returncode == _BLKID_NOTHING_FOUND:
        return ""
    known = [
        line
        for line in answer.stdout.splitlines()
        if line.startswith(("TYPE=", "PTTYPE=", "LABEL="))
    ]
    return ", ".join(known) or answer.stderr.strip() or f"blkid answers {answer.returncode}"


def _format(fd: int, config: RegionConfig, cluster_id: bytes, block_size_bytes: int) -> None:
    """The superblock comes last: a crash before leaves a device without a region."""
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    whole = new_superblock(config, size_bytes, cluster_id, block_size_bytes)
    if size_bytes < whole.data_offset_bytes + block_size_bytes:
        raise ConfigurationError(
            f"region {config.path}: the device has {size_bytes} bytes and holds no block of "
            f"{block_size_bytes} behind what the region takes for itself"
        )
    superblock = new_superblock(
        config, size_bytes - whole.data_offset_bytes, cluster_id, block_size_bytes
    )
    if can_discard(fd):
        discard(fd, 0, size_bytes - size_bytes % ALIGNMENT_BYTES)
    at_end = max(superblock.data_offset_bytes, size_bytes - _SIGNATURES_AT_END_BYTES)
    at_end -= at_end % ALIGNMENT_BYTES
    end = size_bytes - size_bytes % ALIGNMENT_BYTES
    for begin, count in ((0, superblock.data_offset_bytes), (at_end, end - at_end)):
        if count:
            fcntl.ioctl(fd, _BLKZEROOUT, _RANGE.pack(begin, count))
    os.fsync(fd)
    write_superblock(fd, superblock)
    os.fsync(fd)
    log.info("made region %s: %s", config.path, format_bytes(superblock.data_size_bytes))
