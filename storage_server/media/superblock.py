"""Whose region a file is: one small record in two copies before the first block.

    0        superblock, first copy
    16 KiB   how far a memory region is provisioned (see ``memory.py``)
    32 KiB   superblock, second copy
    64 KiB   block 0

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
DATA_OFFSET_BYTES: Final = 64 * KIB
"""Where block 0 begins in the file."""
COPY_OFFSETS_BYTES: Final = (0, 32 * KIB)

_FIELDS: Final = struct.Struct(">8sIB3x16s16sIQ")
_CHECKSUM: Final = struct.Struct(">Q")
SUPERBLOCK_BYTES: Final = _FIELDS.size + _CHECKSUM.size


@dataclass(frozen=True)
class Superblock:
    region_uuid: bytes
    """16 bytes; the same for as long as the region's bytes are there."""
    cluster_id: bytes
    """16 bytes."""
    tier: Tier
    block_size_bytes: int
    block_count: int

    @property
    def data_size_bytes(self) -> int:
        return self.block_count * self.block_size_bytes

    @property
    def file_size_bytes(self) -> int:
        return DATA_OFFSET_BYTES + self.data_size_bytes

    def encode(self) -> bytes:
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            self.tier,
            self.region_uuid,
            self.cluster_id,
            self.block_size_bytes,
            self.block_count,
        )
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
    copies = [os.pread(fd, SUPERBLOCK_BYTES, offset) for offset in COPY_OFFSETS_BYTES]
    superblock = decode_superblock(copies, path)
    size_bytes = os.fstat(fd).st_size
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


def _checks(copy: bytes) -> bool:
    if len(copy) != SUPERBLOCK_BYTES or not copy.startswith(MAGIC):
        return False
    fields, checksum = copy[: _FIELDS.size], copy[_FIELDS.size :]
    return bool(xxhash.xxh3_64_intdigest(fields) == _CHECKSUM.unpack(checksum)[0])


def _decode(copy: bytes, path: Path) -> Superblock:
    _, version, tier, region_uuid, cluster_id, block_size_bytes, block_count = _FIELDS.unpack(
        copy[: _FIELDS.size]
    )
    if version != FORMAT_VERSION:
        raise NotSupportedError(
            f"region {path} has format {version}, this program knows {FORMAT_VERSION}: "
            "serve it with the version that made it"
        )
    if (
        tier not in list(Tier)
        or not BLOCK_SIZE_MIN_BYTES <= block_size_bytes <= BLOCK_SIZE_MAX_BYTES
        or not 1 <= block_count <= REGION_BLOCKS_MAX
    ):
        raise DamagedError(f"region {path}: its superblock checks but makes no sense; restore it")
    return Superblock(region_uuid, cluster_id, Tier(tier), block_size_bytes, block_count)
