"""Sets of integers kept as sorted, disjoint, half-open ranges: dirty bytes, known blocks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Ranges that touch are one. All arguments are ``start`` (inside) and ``end`` (outside)."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, *ranges: tuple[int, int]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(tuple(zip(self._starts, self._ends, strict=True)))

    def __len__(self) -> int:
        """How many separate ranges."""
        return len(self._starts)

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(f'({start}, {end})' for start, end in self)})"

    def add(self, start: int, end: int) -> None:
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def remove(self, start: int, end: int) -> None:
        if start >= end:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        kept = [
            (first, last)
            for first, last in ((self._starts[low], start), (end, self._ends[high - 1]))
            if first < last
        ]
        self._starts[low:high] = [first for first, _ in kept]
        self._ends[low:high] = [last for _, last in kept]

    def covers(self, start: int, end: int) -> bool:
        """Whether every integer of the range is in the set; true of an empty range."""
        if start >= end:
            return True
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and end <= self._ends[index]

    def first_gap(self, start: int, end: int) -> tuple[int, int] | None:
        """The first stretch of the range that is not in the set."""
        index = bisect_right(self._starts, start) - 1
        if index >= 0 and self._ends[index] > start:
            start = self._ends[index]
        if start >= end:
            return None
        following = index + 1
        if following < len(self._starts):
            end = min(end, self._starts[following])
        return start, end
