"""Making, opening and locking the file under a region, the same for every medium."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError, NoSpaceError
from crailfs.limits import REGION_BLOCKS_MAX
from crailfs.records import Tier
from crailfs.units import format_bytes
from storage_server.media.nvme_headers import header_area_bytes
from storage_server.media.superblock import (
    DATA_OFFSET_BYTES,
    Superblock,
    read_superblock,
    write_superblock,
)

log = logging.getLogger(__name__)

Allocate = Callable[[int, Superblock], None]
"""Gives a new file (descriptor, superblock) its full size."""


@dataclass(frozen=True)
class RegionFile:
    """An open region file. The lock lives on ``fd`` alone: clients are passed ``shared_fd``, a
    separate open of the same file, so that a client cannot keep a dead server's lock."""

    path: Path
    fd: int
    shared_fd: int
    superblock: Superblock

    def close(self) -> None:
        os.close(self.shared_fd)
        os.close(self.fd)


def open_region_file(
    config: RegionConfig,
    *,
    cluster_id: bytes,
    block_size_bytes: int,
    known_uuid: bytes | None,
    survives_reboot: bool,
    allocate: Allocate,
) -> RegionFile:
    """The region at ``config.path``, made if there is none. Blocks: call it in a thread.

    ``known_uuid`` is what the server remembers to be there. If the file is gone although the
    medium ``survives_reboot``, or holds another region, that is ``DamagedError``; a vanished
    memory region is made anew with another uuid. Raises ``BusyError`` for a file that somebody
    else serves or that is no region of this cluster, ``ConfigurationError`` for settings that do
    not fit the region, ``NoSpaceError`` if a new region finds no room.
    """
    path = config.path
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if known_uuid is not None and survives_reboot:
            raise gone(path) from None
        if known_uuid is not None:
            warn_of_lost_blocks(path)
        return _make(config, cluster_id, block_size_bytes, allocate)
    except OSError as error:
        raise ConfigurationError(
            f"region {path} cannot be opened: {error.strerror}. Give it the path of a file that "
            "this user may read and write"
        ) from error
    try:
        _lock(fd, path)
        superblock = read_superblock(fd, path)
        check_fits(config, superblock, cluster_id, block_size_bytes, known_uuid)
        return RegionFile(path, fd, _reopen(fd), superblock)
    except BaseException:
        os.close(fd)
        raise


def new_superblock(
    config: RegionConfig, size_bytes: int, cluster_id: bytes, block_size_bytes: int
) -> Superblock:
    """For a new region with room for ``size_bytes`` of blocks. Raises ``ConfigurationError`` if
    that is too little or too much."""
    block_count = size_bytes // block_size_bytes
    if not 1 <= block_count <= REGION_BLOCKS_MAX:
        raise ConfigurationError(
            f"region {config.path}: size_bytes = {size_bytes} makes {block_count} blocks of "
            f"{block_size_bytes} bytes; expected 1 to {REGION_BLOCKS_MAX} blocks"
        )
    data_offset_bytes = DATA_OFFSET_BYTES
    if config.tier == Tier.NVME:
        data_offset_bytes += header_area_bytes(block_count)
    return Superblock(
        uuid.uuid4().bytes,
        cluster_id,
        config.tier,
        block_size_bytes,
        block_count,
        data_offset_bytes,
    )


def open_unfinished(path: Path) -> tuple[Path, int]:
    """The file that becomes the region at ``path`` once it is finished, with whatever a crash left
    in it. Raises ``ConfigurationError`` if it cannot be made."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        return unfinished, os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"region {path} cannot be made: {error.strerror}. Its directory must exist and be "
            "writable by this user"
        ) from error


def gone(path: Path) -> DamagedError:
    """For a region that this server knows, on a medium that keeps it."""
    return DamagedError(
        f"region {path} is gone, although this server knows it. Mount or restore it; or take it "
        "out of the configuration and start once without it: the files that had blocks in it lose "
        "them"
    )


def warn_of_lost_blocks(path: Path) -> None:
    """For a region that this server knows, in memory that was lost."""
    log.warning(
        "region %s is gone (the host restarted?): its blocks are lost, making a new one", path
    )


def _make(
    config: RegionConfig, cluster_id: bytes, block_size_bytes: int, allocate: Allocate
) -> RegionFile:
    """A new region under another name first: a crash leaves no half-made region behind."""
    path = config.path
    superblock = new_superblock(config, config.size_bytes, cluster_id, block_size_bytes)
    unfinished, fd = open_unfinished(path)
    try:
        _lock(fd, unfinished)
        os.ftruncate(fd, 0)
        allocate(fd, superblock)
        write_superblock(fd, superblock)
        os.fsync(fd)
        os.rename(unfinished, path)
        sync_directory(path.parent)
        log.info("made region %s: %s", path, format_bytes(superblock.data_size_bytes))
        return RegionFile(path, fd, _reopen(fd), superblock)
    except OSError as error:
        os.unlink(unfinished)
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                f"region {path}: no room for {format_bytes(superblock.file_size_bytes)} "
                f"({error.strerror}). Make room, or make size_bytes smaller"
            ) from error
        raise
    except BaseException:
        os.close(fd)
        raise


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"region {path} is being served by another process; stop that one first"
        ) from None


def _reopen(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def sync_directory(directory: Path) -> None:
    """Make the names in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _how_to_clear(path: Path) -> str:
    if path.is_block_device():
        return f"clear the device: dd if=/dev/zero of={path} bs=1M count=1"
    if path.is_char_device():
        return f"clear the device: daxio --zero --len 2M --output {path}"
    return "remove the file"


def check_fits(
    config: RegionConfig,
    superblock: Superblock,
    cluster_id: bytes,
    block_size_bytes: int,
    known_uuid: bytes | None,
) -> None:
    """Raises as ``open_region_file`` does if this is not the region that is expected."""
    path = config.path
    if superblock.cluster_id != cluster_id:
        raise BusyError(
            f"region {path} belongs to cluster {superblock.cluster_id.hex()}, not to "
            f"{cluster_id.hex()}; it is left as it is, also with overwrite = true. Give the region "
            f"another path; or, if nobody needs that cluster's files, {_how_to_clear(path)}"
        )
    if known_uuid not in (None, superblock.region_uuid):
        raise DamagedError(
            f"region {path} is {superblock.region_uuid.hex()}, but this server had "
            f"{known_uuid.hex() if known_uuid else ''} there. Put the right file back; or take "
            "the region out of the configuration and start once without it"
        )
    if superblock.tier != config.tier:
        raise ConfigurationError(
            f"region {path} was made for tier {superblock.tier.name.lower()}, the configuration "
            f"says {config.tier.name.lower()}: set it back"
        )
    if superblock.block_size_bytes != block_size_bytes:
        raise ConfigurationError(
            f"region {path} has blocks of {superblock.block_size_bytes} bytes, the cluster's have "
            f"{block_size_bytes}: give the region another path"
        )
    if superblock.block_count != config.size_bytes // block_size_bytes:
        log.info(
            "region %s keeps the size it was made with, %s (the configuration says %s)",
            path,
            format_bytes(superblock.data_size_bytes),
            format_bytes(config.size_bytes),
        )
