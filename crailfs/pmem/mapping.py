"""Mapping the segments of a region one after the other, as if it lay in the file in one piece.

The kernel uses pages of 2 MiB where address and file offset are both multiples of 2 MiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any, Final

from crailfs.units import MIB

LARGE_PAGE_BYTES: Final = 2 * MIB

_MAP_FIXED: Final = 0x10
_MAP_SHARED_VALIDATE: Final = 0x03
_MAP_SYNC: Final = 0x80000
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class SegmentMapping:
    """``view`` is all of the region's bytes, at ``address``. They stay mapped as long as ``view``
    or a part of it is in use anywhere, after this object too."""

    def __init__(
        self,
        fd: int,
        offsets: Sequence[int],
        segment_bytes: int,
        byte_count: int,
        *,
        synchronous: bool,
    ) -> None:
        """Segments begin at ``offsets`` of the file, which are multiples of 2 MiB, and have
        ``segment_bytes``, also one, the last one what is left of ``byte_count``. ``synchronous``:
        the file system keeps its own records of the file up to date with what is stored into the
        mapping. Raises ``OSError``, ``EOPNOTSUPP`` where it cannot. The caller keeps ``fd``."""
        assert (len(offsets) - 1) * segment_bytes < byte_count <= len(offsets) * segment_bytes
        # The last page is mapped whole, as devices demand; whoever laid it out left the room.
        mapped_bytes = -(-byte_count // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        reserved_bytes = mapped_bytes + LARGE_PAGE_BYTES
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _map(0, reserved_bytes, 0, anonymous, -1, 0)
        self.address: Final = -(-reserved // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        shared = _MAP_SHARED_VALIDATE | _MAP_SYNC if synchronous else mmap.MAP_SHARED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            for index, offset in enumerate(offsets):
                begin = index * segment_bytes
                length = min(segment_bytes, mapped_bytes - begin)
                _map(self.address + begin, length, protection, shared | _MAP_FIXED, fd, offset)
        except BaseException:
            _libc.munmap(reserved, reserved_bytes)
            raise
        # A class of its own: only those have weak references.
        array_class: Any = type("Mapped", (ctypes.c_char * byte_count,), {})
        array = array_class.from_address(self.address)
        weakref.finalize(array, _libc.munmap, reserved, reserved_bytes)
        self.view: Final = memoryview(array).cast("B")


def _map(address: int, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    mapped = _libc.mmap(address, length, protection, flags, fd, offset)
    if mapped is None or mapped == _MAP_FAILED:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))
    return int(mapped)
