"""Whose region a file is: one small record in two copies before the first block.

    0        superblock, first copy
    16 KiB   how far a memory region is provisioned (see ``memory.py``)
    32 KiB   superblock, second copy
    64 KiB   block 0; with direct I/O the block headers (see ``nvme_headers.py``), then block 0

Format 1 is that of memory and disk regions; format 2, of regions with direct I/O, also says where
block 0 begins.

It is written once, when the region is made, and never changed. A copy that does not check is
written again from the other one; if neither checks, the region is refused and nothing is written.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from crailfs.errors import BusyError, DamagedError, NotSupportedError
from crailfs.limits import BLOCK_SIZE_MAX_BYTES, BLOCK_SIZE_MIN_BYTES, REGION_BLOCKS_MAX
from crailfs.records import Tier
from crailfs.units import KIB

log = logging.getLogger(__name__)

MAGIC: Final = b"CRAILRGN"
FORMAT_VERSION: Final = 1
DIRECT_FORMAT_VERSION: Final = 2
DATA_OFFSET_BYTES: Final = 64 * KIB
"""Where block 0 begins in the file of a region of format 1."""
COPY_OFFSETS_BYTES: Final = (0, 32 * KIB)

_FIELDS: Final = struct.Struct(">8sIB3x16s16sIQ")
_DATA_OFFSET: Final = struct.Struct(">Q")
_CHECKSUM: Final = struct.Struct(">Q")
_SIZES_BYTES: Final = {
    FORMAT_VERSION: _FIELDS.size + _CHECKSUM.size,
    DIRECT_FORMAT_VERSION: _FIELDS.size + _DATA_OFFSET.size + _CHECKSUM.size,
}
SUPERBLOCK_BYTES: Final = _SIZES_BYTES[FORMAT_VERSION]
_VERSION: Final = struct.Struct(">8xI")


@dataclass(frozen=True)
class Superblock:
    region_uuid: bytes
    """16 bytes; the same for as long as the region's bytes are there."""
    cluster_id: bytes
    """16 bytes."""
    tier: Tier
    block_size_bytes: int
    block_count: int
    data_offset_bytes: int = DATA_OFFSET_BYTES
    """Where block 0 begins in the file."""

    @property
    def data_size_bytes(self) -> int:
        return self.block_count * self.block_size_bytes

    @property
    def file_size_bytes(self) -> int:
        return self.data_offset_bytes + self.data_size_bytes

    def encode(self) -> bytes:
        version = _version_of(self.tier)
        fields = _FIELDS.pack(
            MAGIC,
            version,
            self.tier,
            self.region_uuid,
            self.cluster_id,
            self.block_size_bytes,
            self.block_count,
        )
        if version == DIRECT_FORMAT_VERSION:
            fields += _DATA_OFFSET.pack(self.data_offset_bytes)
        return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def write_superblock(fd: int, superblock: Superblock) -> None:
    """Put both copies into a new region's file; the caller makes them durable."""
    for offset in COPY_OFFSETS_BYTES:
        os.pwrite(fd, superblock.encode(), offset)


def read_superblock(fd: int, path: Path) -> Superblock:
    """The superblock of an existing region's file.

    Raises ``BusyError`` if the file holds something else, ``DamagedError`` if no copy checks or
    the file is shorter than it must be, ``NotSupportedError`` for another format version.
    """
    copies = [_read_copy(fd, offset) for offset in COPY_OFFSETS_BYTES]
    superblock = decode_superblock(copies, path)
    size_bytes = os.lseek(fd, 0, os.SEEK_END)  # fstat does not tell the size of a device
    if size_bytes < superblock.file_size_bytes:
        raise cut_short(path, size_bytes, superblock.file_size_bytes)
    for offset, copy in zip(COPY_OFFSETS_BYTES, copies, strict=True):
        if copy != superblock.encode():
            log.warning("region %s: repairing the superblock copy at byte %d", path, offset)
            os.pwrite(fd, superblock.encode(), offset)
    return superblock


def cut_short(path: Path, size_bytes: int, expected_bytes: int) -> DamagedError:
    return DamagedError(
        f"region {path} is cut short: {size_bytes} of {expected_bytes} bytes. "
        "Restore the file, or move it away and take the region out of the configuration"
    )


def decode_superblock(copies: Sequence[bytes], path: Path) -> Superblock:
    """What the copies that check agree on. Raises as ``read_superblock`` does."""
    good = [copy for copy in copies if _checks(copy)]
    if not good:
        if any(copy.startswith(MAGIC) for copy in copies):
            raise DamagedError(
                f"region {path}: both copies of its superblock are damaged; its blocks cannot be "
                "trusted. Restore the file, or move it away and take the region out of the "
                "configuration: the files that had blocks in it lose them"
            )
        raise BusyError(
            f"{path} exists and is not a CrailFS region; it is left as it is. Give the region "
            "another path, or remove the file if nobody needs it"
        )
    if any(copy != good[0] for copy in good):
        raise DamagedError(
            f"region {path}: the two copies of its superblock contradict each other. Restore the "
            "file, or move it away and take the region out of the configuration"
        )
    return _decode(good[0], path)


def copies_there(fd: int) -> list[bool]:
    """For each copy whether it is there, be it damaged."""
    return [os.pread(fd, len(MAGIC), offset) == MAGIC for offset in COPY_OFFSETS_BYTES]


def _read_copy(fd: int, offset: int) -> bytes:
    """As many bytes as its format has; of an unknown format as many as format 1 has."""
    stored = os.pread(fd, max(_SIZES_BYTES.values()), offset)
    version = _VERSION.unpack_from(stored)[0] if len(stored) >= _VERSION.size else 0
    return stored[: _SIZES_BYTES.get(version, _SIZES_BYTES[FORMAT_VERSION])]


def _checks(copy: bytes) -> bool:
    if len(copy) not in _SIZES_BYTES.values() or not copy.startswith(MAGIC):
        return False
    fields, checksum = copy[: -_CHECKSUM.size], copy[-_CHECKSUM.size :]
    return bool(xxhash.xxh3_64_intdigest(fields) == _CHECKSUM.unpack(checksum)[0])


def _version_of(tier: Tier) -> int:
    return DIRECT_FORMAT_VERSION if tier == Tier.NVME else FORMAT_VERSION


def _decode(copy: bytes, path: Path) -> Superblock:
    _, version, tier, region_uuid, cluster_id, block_size_bytes, block_count = _FIELDS.unpack(
        copy[: _FIELDS.size]
    )
    if version not in _SIZES_BYTES:
        raise NotSupportedError(
            f"region {path} has format {version}, this program knows 1 and 2: serve it with the "
            "version that made it"
        )
    if tier == Tier.NVME and version == FORMAT_VERSION:
        raise NotSupportedError(
            f"region {path} of tier nvme was made before that tier had direct I/O, in format 1. "
            "Copy what is needed out of it with the version that made it; then remove the file, "
            "and a new region is made"
        )
    data_offset_bytes = DATA_OFFSET_BYTES
    if version == DIRECT_FORMAT_VERSION:
        (data_offset_bytes,) = _DATA_OFFSET.unpack_from(copy, _FIELDS.size)
    if (
        tier not in list(Tier)
        or version != _version_of(tier)
        or not BLOCK_SIZE_MIN_BYTES <= block_size_bytes <= BLOCK_SIZE_MAX_BYTES
        or not 1 <= block_count <= REGION_BLOCKS_MAX
        or data_offset_bytes % DATA_OFFSET_BYTES
    ):
        raise DamagedError(f"region {path}: its superblock checks but makes no sense; restore it")
    return Superblock(
        region_uuid, cluster_id, Tier(tier), block_size_bytes, block_count, data_offset_bytes
    )
