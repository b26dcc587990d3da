"""Making, opening and locking the libpmemobj pool under a region: see ``pmem_format``."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from crailfs.config import RegionConfig
from crailfs.errors import BusyError, ConfigurationError, DamagedError, NoSpaceError
from crailfs.pmem import libpmem, libpmemobj
from crailfs.pmem.libpmemobj import Pool
from crailfs.pmem.mapping import LARGE_PAGE_BYTES, SegmentMapping
from crailfs.units import format_bytes
from storage_server.media import pmem_format as form
from storage_server.media.memory import HOST_MEMORY_FLOOR_BYTES, host_memory_available_bytes
from storage_server.media.pmem_place import Place, examine, in_memory
from storage_server.media.region_file import (
    check_fits,
    gone,
    new_superblock,
    open_unfinished,
    sync_directory,
    warn_of_lost_blocks,
)
from storage_server.media.superblock import (
    Superblock,
    cut_short,
    decode_superblock,
)

log = logging.getLogger(__name__)

_WHOLE_FILE_LOCK: Final = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@dataclass(frozen=True)
class PmemRegion:
    """An open region. Our lock lives on ``fd`` alone; libpmemobj has another of its own."""

    path: Path
    fd: int
    shared_fd: int
    place: Place
    pool: Pool
    root: int
    """Offset of the root object in the pool."""
    superblock: Superblock
    directory: form.Directory

    def close(self) -> None:
        self.pool.close()
        os.close(self.shared_fd)
        os.close(self.fd)


def open_pmem_region(
    config: RegionConfig, *, cluster_id: bytes, block_size_bytes: int, known_uuid: bytes | None
) -> PmemRegion:
    """The region at ``config.path``, made if there is none. Blocks: call it in a thread.

    Raises what ``region_file.open_region_file`` does, and ``ConfigurationError`` if libpmem or
    libpmemobj is missing.
    """
    path = config.path
    for missing in (libpmem.missing(), libpmemobj.missing()):
        if missing is not None:
            raise ConfigurationError(f"region {path} of tier pmem: {missing}, or use another tier")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = _make_file(config, cluster_id, block_size_bytes, known_uuid)
        known_uuid = None
    except OSError as error:
        raise ConfigurationError(
            f"region {path} cannot be opened: {error.strerror}. Give it the path of a file or DAX "
            "device that this user may read and write"
        ) from error
    try:
        _lock(fd, path)
        place = examine(path, fd)
        front = _read_front(fd, place)
        if place.kind.is_device and form.recognised_pool_bytes(front) is None:
            _make_on_device(config, fd, place, front, cluster_id, block_size_bytes, known_uuid)
        may_remake = place.kind.is_device and known_uuid is None
        try:
            pool = _open_pool(path, fd, place)
        except DamagedError as error:
            if not (may_remake and config.overwrite):
                raise
            log.warning("%s; making it anew, as overwrite = true", error)
            _make_on_device(config, fd, place, b"", cluster_id, block_size_bytes, known_uuid)
            pool = _open_pool(path, fd, place)
        if may_remake and _is_unfinished(pool):
            log.warning("region %s was being made when that ended: making it anew", path)
            pool.close()
            _make_on_device(config, fd, place, b"", cluster_id, block_size_bytes, known_uuid)
            pool = _open_pool(path, fd, place)
        try:
            root, superblock, directory = _read_root(path, pool, place)
            if place.kind.is_device:  # which has the size that it has
                config = msgspec.structs.replace(config, size_bytes=superblock.data_size_bytes)
            check_fits(config, superblock, cluster_id, block_size_bytes, known_uuid)
            shared_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            pool.close()
            raise
        return PmemRegion(path, fd, shared_fd, place, pool, root, superblock, directory)
    except BaseException:
        os.close(fd)
        raise


# --- making -------------------------------------------------------------------------------------


def _make_file(
    config: RegionConfig, cluster_id: bytes, block_size_bytes: int, known_uuid: bytes | None
) -> int:
    """A new region under another name first: a crash leaves no half-made region behind. Returns
    the locked descriptor."""
    path = config.path
    if path.parent == Path("/dev"):
        raise ConfigurationError(
            f"region {path}: there is no such device. See which ones there are with 'daxctl list'"
        )
    superblock = new_superblock(config, config.size_bytes, cluster_id, block_size_bytes)
    pool_bytes = form.pool_bytes_for(superblock.block_count, block_size_bytes)
    unfinished, fd = open_unfinished(path)
    try:
        _lock(fd, unfinished)
        volatile = in_memory(fd)
        if known_uuid is not None and not volatile:
            os.unlink(unfinished)
            raise gone(path)
        if known_uuid is not None:
            warn_of_lost_blocks(path)
        os.ftruncate(fd, 0)
        _allocate(path, unfinished, fd, pool_bytes, volatile=volatile)
        _format(unfinished, fd, pool_bytes, superblock)
        os.fsync(fd)
        os.rename(unfinished, path)
        sync_directory(path.parent)
        log.info("made region %s: %s", path, format_bytes(superblock.data_size_bytes))
        return fd
    except BaseException:
        os.close(fd)
        raise


def _allocate(path: Path, unfinished: Path, fd: int, pool_bytes: int, *, volatile: bool) -> None:
    available_bytes = host_memory_available_bytes() - HOST_MEMORY_FLOOR_BYTES
    try:
        if volatile and available_bytes < pool_bytes:
            raise OSError(errno.ENOSPC, f"the host has {format_bytes(available_bytes)} of memory")
        os.posix_fallocate(fd, 0, pool_bytes)
    except OSError as error:
        os.unlink(unfinished)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                f"region {path}: no room for {format_bytes(pool_bytes)} ({error.strerror}). "
                "Make room, or make size_bytes smaller"
            ) from error
        raise


def _make_on_device(
    config: RegionConfig,
    fd: int,
    place: Place,
    front: bytes,
    cluster_id: bytes,
    block_size_bytes: int,
    known_uuid: bytes | None,
) -> None:
    """``front``: what the device begins with."""
    path = config.path
    if known_uuid is not None:
        raise gone(path)
    if front.count(0) != len(front) and not config.overwrite:
        raise BusyError(
            f"{path} is not empty and no CrailFS region; it is left as it is. If nobody needs what "
            "it holds, set overwrite = true for this region"
        )
    block_count = form.blocks_fitting(place.size_bytes, block_size_bytes)
    superblock = new_superblock(
        config, block_count * block_size_bytes, cluster_id, block_size_bytes
    )
    _format(path, fd, place.size_bytes, superblock)
    log.info("made region %s: %s", path, format_bytes(superblock.data_size_bytes))


def _format(path: Path, fd: int, pool_bytes: int, superblock: Superblock) -> None:
    """The superblock comes last: without it, the region is not finished."""
    pool = _create_pool(path, fd, pool_bytes)
    try:
        sizes = form.segment_sizes(superblock.data_size_bytes, form.SEGMENT_BYTES)
        root = pool.root(form.DIRECTORY_OFFSET + form.directory_bytes(len(sizes)))
        data = [pool.allocate(form.data_object_bytes(size), zero=False) for size in sizes]
        headers = [
            pool.allocate(form.header_object_bytes(size, superblock.block_size_bytes), zero=True)
            for size in sizes
        ]
        directory = form.Directory(
            form.SEGMENT_BYTES,
            tuple(_align(offset, LARGE_PAGE_BYTES) for offset in data),
            tuple(_align(offset, form.HEADER_BYTES) for offset in headers),
        )
        pool.write(root + form.DIRECTORY_OFFSET, form.encode_directory(directory))
        pool.write(root + form.STATE_OFFSET, form.encode_state(0, 0))
        for offset in form.SUPERBLOCK_OFFSETS:
            pool.write(root + offset, superblock.encode())
    finally:
        pool.close()


def _create_pool(path: Path, fd: int, pool_bytes: int) -> Pool:
    layout = form.layout_name(pool_bytes)
    try:
        _clear_front(fd)
        return Pool.create(path, layout, count_unsafe_shutdowns=True)
    except OSError as error:
        log.info("region %s: %s; power cuts that its device fails in go unseen", path, error)
        _clear_front(fd)
        return Pool.create(path, layout, count_unsafe_shutdowns=False)


def _clear_front(fd: int) -> None:
    front = SegmentMapping(fd, [0], form.FRONT_BYTES, form.FRONT_BYTES, synchronous=False)
    libpmem.memset(front.address, 0, form.FRONT_BYTES)


# --- opening ------------------------------------------------------------------------------------


def _read_front(fd: int, place: Place) -> bytes:
    if not place.kind.is_device:
        return os.pread(fd, form.FRONT_BYTES, 0)
    front = SegmentMapping(fd, [0], form.FRONT_BYTES, form.FRONT_BYTES, synchronous=False)
    return bytes(front.view)


def _open_pool(path: Path, fd: int, place: Place) -> Pool:
    pool_bytes = form.recognised_pool_bytes(_read_front(fd, place))
    if pool_bytes is None:
        raise BusyError(
            f"{path} exists and is not a CrailFS region of tier pmem; it is left as it is. Give "
            "the region another path, or remove the file if nobody needs it"
        )
    if place.size_bytes < pool_bytes:
        raise cut_short(path, place.size_bytes, pool_bytes)
    layout = form.layout_name(pool_bytes)
    try:
        if not place.kind.is_device and not libpmemobj.check(path, layout):
            raise OSError(errno.EINVAL, "its pool is not consistent")
        return Pool.open(path, layout)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise _busy(path) from error
        raise DamagedError(
            f"region {path} cannot be opened: {error.strerror}. Restore it; or take it out of the "
            "configuration, and start once without it: the files that had blocks in it lose them. "
            "Then remove the file, or set overwrite = true for the device, to use it anew"
        ) from error


def _is_unfinished(pool: Pool) -> bool:
    if pool.root_bytes() < form.DIRECTORY_OFFSET:
        return True
    root = pool.root(pool.root_bytes())
    copies = b"".join(pool.read(root + at, form.SUPERBLOCK_BYTES) for at in form.SUPERBLOCK_OFFSETS)
    return copies.count(0) == len(copies)


def _read_root(path: Path, pool: Pool, place: Place) -> tuple[int, Superblock, form.Directory]:
    root_bytes = pool.root_bytes()
    if root_bytes < form.DIRECTORY_OFFSET:
        raise _damaged_root(path)
    root = pool.root(root_bytes)
    copies = [pool.read(root + offset, form.SUPERBLOCK_BYTES) for offset in form.SUPERBLOCK_OFFSETS]
    superblock = decode_superblock(copies, path)
    record = pool.read(root + form.DIRECTORY_OFFSET, root_bytes - form.DIRECTORY_OFFSET)
    directory = form.decode_directory(record, place.size_bytes)
    if directory is None or len(directory.data_offsets) != len(
        form.segment_sizes(superblock.data_size_bytes, directory.segment_bytes)
    ):
        raise _damaged_root(path)
    for offset, copy in zip(form.SUPERBLOCK_OFFSETS, copies, strict=True):
        if copy != superblock.encode():
            log.warning("region %s: repairing the superblock copy at byte %d", path, root + offset)
            pool.write(root + offset, superblock.encode())
    return root, superblock, directory


# --- helpers ------------------------------------------------------------------------------------


def _lock(fd: int, path: Path) -> None:
    # Not flock: libpmemobj takes that one on a descriptor of its own.
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE_LOCK)
    except BlockingIOError:
        raise _busy(path) from None


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _busy(path: Path) -> BusyError:
    return BusyError(f"region {path} is being served by another process; stop that one first")


def _damaged_root(path: Path) -> DamagedError:
    return DamagedError(
        f"region {path}: its directory of segments is damaged. Restore it, or move it away and "
        "take the region out of the configuration: the files that had blocks in it lose them"
    )
