"""What the audit counts, a window of nodes or blocks at a time, so that its memory is bounded."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice

from crailfs.records import Attributes
from crailfs.units import MIB, ROOT_INODE

WINDOW_NODES = 2_000_000
"""20 bytes each."""
WINDOW_BLOCKS = 64 * MIB
"""One byte each."""


class LinkWindow:
    """How many entries the next so many of ``nodes`` should have, and have."""

    def __init__(
        self, nodes: Iterator[Attributes], *, after: int = -1, limit: int = WINDOW_NODES
    ) -> None:
        """``after``: the last inode of the window before; -1: there is none."""
        self._after = after
        self._inos = array("Q")
        self._expected = array("I")
        for node in islice(nodes, limit):
            self._inos.append(node.ino)
            self._expected.append(_names(node))
        self._counted = array("I", bytes(self._expected.itemsize * len(self._expected)))
        self.is_last = len(self._inos) < limit

    @property
    def last_ino(self) -> int:
        return self._inos[-1]

    def count(self, ino: int) -> bool:
        """One entry of ``ino`` was seen. False if there is no such node."""
        index = bisect_left(self._inos, ino)
        if ino <= self._after or (index == len(self._inos) and not self.is_last):
            return True
        if index == len(self._inos) or self._inos[index] != ino:
            return False
        self._counted[index] += 1
        return True

    def differing(self) -> Iterator[tuple[int, int, int]]:
        """(inode, entries that it should have, entries that it has)."""
        for ino, expected, counted in zip(self._inos, self._expected, self._counted, strict=True):
            if expected != counted:
                yield ino, expected, counted


def _names(node: Attributes) -> int:
    if node.ino == ROOT_INODE:
        return 0
    return min(node.nlink, 1) if node.is_directory else node.nlink


class BlockWindow:
    """Which blocks of some parts of regions somebody has."""

    def __init__(self, parts: dict[int, tuple[int, int]], *, first: bool) -> None:
        self.first = first
        """Whether this is the first window over the regions."""
        self._parts = {
            region: (begin, bytearray(end - begin)) for region, (begin, end) in parts.items()
        }

    def claim(self, region: int, block: int, count: int) -> bool:
        """Somebody has these blocks. False if one of those in the window was claimed before."""
        part = self._parts.get(region)
        if part is None:
            return True
        begin, marks = part
        low, high = max(block - begin, 0), min(block + count - begin, len(marks))
        if low >= high:
            return True
        fresh = marks.find(1, low, high) < 0
        marks[low:high] = b"\1" * (high - low)
        return fresh

    def unclaimed(self) -> Iterator[tuple[int, int, int]]:
        """(region, block, count) of all in the window that nobody claimed."""
        for region, (begin, marks) in self._parts.items():
            at = marks.find(0)
            while at >= 0:
                end = marks.find(1, at)
                end = len(marks) if end < 0 else end
                yield region, begin + at, end - at
                at = marks.find(0, end)


def block_windows(
    usable_blocks: dict[int, int], limit: int = WINDOW_BLOCKS
) -> Iterator[BlockWindow]:
    """Windows of at most ``limit`` blocks that together cover the regions; at least one."""
    parts: dict[int, tuple[int, int]] = {}
    room, first = limit, True
    for region, blocks in usable_blocks.items():
        begin = 0
        while begin < blocks:
            if not room:
                yield BlockWindow(parts, first=first)
                parts, room, first = {}, limit, False
            end = min(blocks, begin + room)
            parts[region] = (begin, end)
            room -= end - begin
            begin = end
    if parts or first:
        yield BlockWindow(parts, first=first)
