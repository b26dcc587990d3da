"""Numbers that the kernel holds for what it has open."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Generic, TypeVar

import pyfuse3

T = TypeVar("T")


class HandleTable(Generic[T]):
    """Open things by number; a number is never given twice."""

    def __init__(self) -> None:
        self._open: dict[int, T] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._open.values()))

    def add(self, value: T) -> int:
        handle = self._next
        self._next += 1
        self._open[handle] = value
        return handle

    def get(self, handle: int) -> T:
        """Raises ``FUSEError`` EBADF for a number that is not open."""
        try:
            return self._open[handle]
        except KeyError:
            raise pyfuse3.FUSEError(errno.EBADF) from None

    def remove(self, handle: int) -> T:
        """As ``get``, and the number is not open any more."""
        value = self.get(handle)
        del self._open[handle]
        return value
