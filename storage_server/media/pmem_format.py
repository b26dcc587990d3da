"""How a region lies in its libpmemobj pool.

The layout's name, which libpmemobj keeps in clear at byte 4096 of the file, says that it is one of
ours and how large it was made. The root object:

    0      superblock, first copy
    512    superblock, second copy
    1024   state: applied sequence, blocks in use, check
    1088   directory: bytes a segment, segments, then for each where its blocks and their headers
           begin in the pool; check

An object of libpmemobj fits into one zone of its heap, 15.998 GiB. So the blocks lie in segments,
each of them one object, aligned to 2 MiB within it; 16 of them fill a zone. The headers of a
segment's blocks are another object, a cache line each. All figures little-endian.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from crailfs.pmem.mapping import LARGE_PAGE_BYTES
from crailfs.records import BlockHeader, Tier
from crailfs.units import GIB, KIB, MIB
from storage_server.media.superblock import Superblock

SEGMENT_BYTES: Final = 1020 * MIB
"""Multiple of the largest block size and of 2 MiB."""
HEADER_BYTES: Final = 64
SUPERBLOCK_OFFSETS: Final = (0, 512)
SUPERBLOCK_BYTES: Final = len(Superblock(bytes(16), bytes(16), Tier.PMEM, 0, 0).encode())
STATE_OFFSET: Final = 1024
DIRECTORY_OFFSET: Final = 1088
FRONT_BYTES: Final = LARGE_PAGE_BYTES
"""What is looked at to tell whether a device holds anything: superblocks of file systems, volume
managers and partition tables lie there."""

_SIGNATURE: Final = b"PMEMOBJ\0"
_LAYOUT_AT: Final = slice(4 * KIB, 4 * KIB + 64)
_LAYOUT: Final = re.compile(rb"crailfs-region-1:([0-9]{1,18})\0")

_POOL_OVERHEAD_BYTES: Final = 16 * MIB
"""Descriptor, 1024 lanes of 3 KiB, heap header, and room for the logs of large transactions."""
_OBJECT_OVERHEAD_BYTES: Final = 512 * KIB
"""An object's header and rounding up to the heap's chunks of 256 KiB."""
_ZONE_BYTES: Final = 15 * GIB
"""Rather less than a zone has."""
_ZONE_OVERHEAD_BYTES: Final = 40 * MIB
"""A zone's own records, and what stays empty at its end because no object fits."""

_STATE: Final = struct.Struct("<QQ")
_DIRECTORY: Final = struct.Struct("<QQ")
_SEGMENT: Final = struct.Struct("<QQ")
_CHECK: Final = struct.Struct("<Q")
STATE_BYTES: Final = _STATE.size + _CHECK.size

_HEADER: Final = struct.Struct("<IIIxxxxQQQQ")
_HEADER_PADDING: Final = bytes(HEADER_BYTES - _HEADER.size - _CHECK.size)
_IN_USE: Final = 1
FREE_HEADER: Final = bytes(HEADER_BYTES)


@dataclass(frozen=True)
class Directory:
    segment_bytes: int
    data_offsets: tuple[int, ...]
    header_offsets: tuple[int, ...]


def layout_name(pool_bytes: int) -> str:
    return f"crailfs-region-1:{pool_bytes}"


def recognised_pool_bytes(front: bytes | memoryview) -> int | None:
    """The size that the pool was made with; None if the file's front is not that of a region."""
    found = _LAYOUT.match(bytes(front[_LAYOUT_AT]))
    if bytes(front[: len(_SIGNATURE)]) != _SIGNATURE or found is None:
        return None
    return int(found[1])


# --- sizes --------------------------------------------------------------------------------------


def segment_sizes(data_bytes: int, segment_bytes: int) -> list[int]:
    """Bytes of each segment: all are full but the last."""
    full, rest = divmod(data_bytes, segment_bytes)
    return [segment_bytes] * full + [rest] * (rest > 0)


def data_object_bytes(segment_size: int) -> int:
    """Room for a segment wherever 2 MiB begin in it, mapped in pages of 2 MiB."""
    return _up(segment_size) + LARGE_PAGE_BYTES


def header_object_bytes(segment_size: int, block_size_bytes: int) -> int:
    return segment_size // block_size_bytes * HEADER_BYTES + HEADER_BYTES


def pool_bytes_for(block_count: int, block_size_bytes: int) -> int:
    """What a pool takes that certainly has room for so many blocks."""
    sizes = segment_sizes(block_count * block_size_bytes, SEGMENT_BYTES)
    objects = sum(
        data_object_bytes(size)
        + header_object_bytes(size, block_size_bytes)
        + 2 * _OBJECT_OVERHEAD_BYTES
        for size in sizes
    )
    zones = objects // _ZONE_BYTES
    return _up(objects + zones * _ZONE_OVERHEAD_BYTES + _POOL_OVERHEAD_BYTES)


def blocks_fitting(pool_bytes: int, block_size_bytes: int) -> int:
    """The most blocks for which ``pool_bytes_for`` stays within ``pool_bytes``."""
    low, high = 0, pool_bytes // block_size_bytes
    while low < high:
        middle = (low + high + 1) // 2
        if pool_bytes_for(middle, block_size_bytes) <= pool_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _up(byte_count: int) -> int:
    return -(-byte_count // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES


# --- records ------------------------------------------------------------------------------------


def directory_bytes(segment_count: int) -> int:
    return _DIRECTORY.size + segment_count * _SEGMENT.size + _CHECK.size


def encode_directory(directory: Directory) -> bytes:
    segments = zip(directory.data_offsets, directory.header_offsets, strict=True)
    fields = _DIRECTORY.pack(directory.segment_bytes, len(directory.data_offsets))
    return _checked(fields + b"".join(_SEGMENT.pack(*segment) for segment in segments))


def decode_directory(record: bytes, pool_bytes: int) -> Directory | None:
    """From the record's begin and whatever follows. None if it does not check."""
    if len(record) < _DIRECTORY.size:
        return None
    segment_bytes, count = _DIRECTORY.unpack_from(record)
    if not 0 < count <= pool_bytes // LARGE_PAGE_BYTES:
        return None
    fields = _unchecked(record[: directory_bytes(count)])
    if fields is None:
        return None
    segments = list(_SEGMENT.iter_unpack(fields[_DIRECTORY.size :]))
    if any(offset % LARGE_PAGE_BYTES or offset >= pool_bytes for offset, _ in segments):
        return None
    data_offsets, header_offsets = zip(*segments, strict=True)
    return Directory(segment_bytes, data_offsets, header_offsets)


def encode_state(applied_sequence: int, held_blocks: int) -> bytes:
    return _checked(_STATE.pack(applied_sequence, held_blocks))


def decode_state(record: bytes) -> tuple[int, int] | None:
    """None if it does not check."""
    fields = _unchecked(record)
    return None if fields is None else _STATE.unpack(fields)


def encode_header(header: BlockHeader) -> bytes:
    fields = _HEADER.pack(
        _IN_USE,
        header.stored_bytes,
        header.visible_bytes,
        header.ino,
        header.file_block,
        header.generation,
        header.checksum,
    )
    return _checked(fields, header.block) + _HEADER_PADDING


def decode_header(record: bytes, block: int) -> BlockHeader | None:
    """Of a header that is not ``FREE_HEADER``. None if it does not check, or is another block's."""
    fields = _unchecked(record[: _HEADER.size + _CHECK.size], block)
    if fields is None:
        return None
    state, stored_bytes, visible_bytes, ino, file_block, generation, checksum = _HEADER.unpack(
        fields
    )
    if state != _IN_USE:
        return None
    return BlockHeader(block, ino, file_block, generation, stored_bytes, visible_bytes, checksum)


def _checked(fields: bytes, seed: int = 0) -> bytes:
    return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields, seed))


def _unchecked(record: bytes, seed: int = 0) -> bytes | None:
    fields, check = record[: -_CHECK.size], record[-_CHECK.size :]
    if (
        len(check) != _CHECK.size
        or xxhash.xxh3_64_intdigest(fields, seed) != _CHECK.unpack(check)[0]
    ):
        return None
    return fields
