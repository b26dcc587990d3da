"""Memory that a device can be told to fill and to read: aligned, and used again and again.

A buffer is a memory view. It goes back when the last view of it is dropped, whoever holds that.
Measured: ``take`` and dropping it 1.3 us; clearing fresh memory instead 20 us/MiB.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import defaultdict
from typing import Final, TypeAlias

from crailfs.units import KIB, MIB

ALIGNMENT_BYTES: Final = 4 * KIB
"""Offsets, lengths and addresses of direct I/O are multiples of it: no device in use has larger
sectors, and memory of a page is good for every one."""
SIZE_MIN_BYTES: Final = 64 * KIB
"""Of what is mapped: smaller buffers use the beginning of one."""
IDLE_MAX_BYTES: Final = 64 * MIB
"""Kept for the next ``take``; what comes back beyond it is given to the kernel."""


_Array: TypeAlias = "ctypes.Array[ctypes.c_char]"


class _Use(weakref.ref[_Array]):
    """Watches the array laid over ``memory``."""

    __slots__ = ("memory",)
    memory: mmap.mmap


class AlignedBuffers:
    """Hands out buffers. Does not limit how much is out: its users know how much that can be."""

    def __init__(self, idle_max_bytes: int = IDLE_MAX_BYTES) -> None:
        self._idle_max_bytes = idle_max_bytes
        self._idle: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
        self.idle_bytes = 0
        self._uses: dict[int, _Use] = {}
        self.made_count = 0
        """Buffers that had to be mapped, so far."""

    @property
    def taken_count(self) -> int:
        """Buffers that somebody holds."""
        return len(self._uses)

    def take(self, byte_count: int) -> memoryview:
        """``byte_count`` bytes that begin at a page, with whatever was in them before."""
        size_bytes = max(SIZE_MIN_BYTES, 1 << (byte_count - 1).bit_length())
        idle = self._idle[size_bytes]
        if idle:
            memory = idle.pop()
            self.idle_bytes -= size_bytes
        else:
            # The size that was missing last is the last to be given up.
            self._idle[size_bytes] = self._idle.pop(size_bytes)
            self.made_count += 1
            memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # An mmap cannot tell when its last view goes; an array laid over it can.
        array = (ctypes.c_char * size_bytes).from_buffer(memory)
        use = _Use(array, self._dropped)
        use.memory = memory
        self._uses[id(use)] = use
        return memoryview(array).cast("B")[:byte_count]

    def _dropped(self, use: weakref.ref[_Array]) -> None:
        memory = self._uses.pop(id(use)).memory
        size_bytes = len(memory)
        self._idle[size_bytes].append(memory)
        self.idle_bytes += size_bytes
        if self.idle_bytes > self._idle_max_bytes:
            self._give_up_some()

    def _give_up_some(self) -> None:
        for size_bytes, idle in self._idle.items():
            while idle and self.idle_bytes > self._idle_max_bytes:
                idle.pop()
                self.idle_bytes -= size_bytes


def round_up(byte_count: int) -> int:
    """To a multiple of ``ALIGNMENT_BYTES``."""
    return (byte_count + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES


def address_of(buffer: memoryview) -> int:
    """Of memory that may be written to."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
