"""Registered memory for bytes on their way, used again and again.

Registering memory costs far more than copying a block, so buffers are kept. What is handed out is
a view; the buffer comes back when the last view of it, or of a part of it, is dropped, wherever
that happens. Nobody waits for a buffer: beyond what is kept, one is registered for its one use, so
that readers who hold on to their bytes can hold up nobody.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import mmap
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from crailfs.net.sending import Buffer
from crailfs.units import KIB, MIB

SIZE_MIN_BYTES: Final = 64 * KIB
KEPT_SIZE_MAX_BYTES: Final = 8 * MIB
KEPT_MAX_BYTES: Final = 64 * MIB
"""Of memory that is registered and not in use: as much as a client writes behind."""


class Registration(NamedTuple):
    key: int
    """The lkey."""
    region: object
    """Registered as long as this lives."""


class Lease(NamedTuple):
    """Registered memory in use as long as ``view`` or something made from it lives."""

    view: memoryview
    address: int
    key: int


class _Memory:
    def __init__(self, pool: BufferPool, size_bytes: int) -> None:
        self.pool = weakref.ref(pool)
        self.size_bytes = size_bytes
        self.mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A child process has no use for it, and must not make the kernel copy pages in use here.
        self.mapping.madvise(mmap.MADV_DONTFORK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.registration = pool.register(self.address, size_bytes)


class BufferPool:
    def __init__(self, register: Callable[[int, int], Registration]) -> None:
        """``register(address, byte_count)``; what it raises, ``take`` does."""
        self.register = register
        self._free: dict[int, list[_Memory]] = {}
        self._returned: collections.deque[_Memory] = collections.deque()
        """Filled by whichever thread drops a last view; emptied only by the pool's own."""
        self.free_bytes = 0
        self.registrations = 0

    def take(self, byte_count: int) -> Lease:
        """At least one byte, its content undefined."""
        self._take_back()
        size_bytes = max(SIZE_MIN_BYTES, 1 << (byte_count - 1).bit_length())
        if size_bytes > KEPT_SIZE_MAX_BYTES:
            size_bytes = -(-byte_count // mmap.PAGESIZE) * mmap.PAGESIZE
        free = self._free.get(size_bytes)
        if free:
            memory = free.pop()
            self.free_bytes -= size_bytes
        else:
            if free is not None:
                # The size that was missing last is the last to be given up.
                self._free[size_bytes] = self._free.pop(size_bytes)
            memory = _Memory(self, size_bytes)
            self.registrations += 1
        use = _use_type(size_bytes).from_buffer(memory.mapping)
        use.memory = memory
        weakref.finalize(use, self._returned.append, memory).atexit = False
        view = memoryview(use).cast("B")[:byte_count]
        return Lease(view, memory.address, memory.registration.key)

    def find(self, data: Buffer) -> Lease | None:
        """``data``'s own memory, if it came from ``take``."""
        view = memoryview(data)
        memory = getattr(view.obj, "memory", None)
        if not isinstance(memory, _Memory) or memory.pool() is not self or view.readonly:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        return Lease(view, address, memory.registration.key)

    @staticmethod
    def holds(data: Buffer) -> bool:
        """Whether ``data`` lies in memory of a pool: no processor has copied it out of there."""
        return isinstance(getattr(memoryview(data).obj, "memory", None), _Memory)

    def _take_back(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            if memory.size_bytes <= KEPT_SIZE_MAX_BYTES:
                self._free.setdefault(memory.size_bytes, []).append(memory)
                self.free_bytes += memory.size_bytes
        for size_bytes, free in self._free.items():
            while free and self.free_bytes > KEPT_MAX_BYTES:
                free.pop()
                self.free_bytes -= size_bytes


@functools.cache
def _use_type(size_bytes: int) -> Any:
    """One object of it is one use of a buffer: unlike the mapping, it ends with its last view."""
    return type(f"Use{size_bytes}", (ctypes.c_ubyte * size_bytes,), {})
