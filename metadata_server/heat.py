"""How much each node is used, as far as the metadata server hears of it.

It hears of maps asked for, of commits and, about once a second, of what each client has open. All
of this is in memory: after a restart nothing is hot, and what is cold is told by a node's times.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

NODES_MAX: Final = 1 << 17
"""Of one generation: about 25 MB."""
ROTATE_S: Final = 600.0
"""A node that was not used for this long is forgotten between once and twice this later."""
HALF_LIFE_S: Final = 60.0
COUNTED_APART_S: Final = 0.5
"""Uses that follow each other more quickly are one: a map is asked for in pieces."""
HOT_USES: Final = 4.0
HOT_NODES_MAX: Final = 4_096


class _Use(NamedTuple):
    last_s: float
    counted_s: float
    """Of the last use that was counted."""
    uses: float
    """At ``counted_s``; halved with each ``HALF_LIFE_S`` that has passed."""

    def uses_at(self, now_s: float) -> float:
        return self.uses * float(0.5 ** ((now_s - self.counted_s) / HALF_LIFE_S))


class Heat:
    """Two generations of a dictionary, the older one dropped every ``ROTATE_S``, or sooner when
    the newer one is full."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._current: dict[int, _Use] = {}
        self._previous: dict[int, _Use] = {}
        self._rotated_s = clock_s()
        self._hot: OrderedDict[int, None] = OrderedDict()

    def use(self, ino: int) -> None:
        """The node is read, written or open now."""
        now_s = self._clock_s()
        if now_s - self._rotated_s >= ROTATE_S or len(self._current) >= NODES_MAX:
            self._rotated_s = now_s
            self._previous, self._current = self._current, {}
        known = self._find(ino)
        if known is None:
            self._current[ino] = _Use(now_s, now_s, 1.0)
            return
        if now_s - known.counted_s < COUNTED_APART_S:
            self._current[ino] = known._replace(last_s=now_s)
            return
        uses = known.uses_at(now_s) + 1.0
        self._current[ino] = _Use(now_s, now_s, uses)
        if uses >= HOT_USES:
            self._hot[ino] = None
            self._hot.move_to_end(ino)
            if len(self._hot) > HOT_NODES_MAX:
                self._hot.popitem(last=False)

    def idle_s(self, ino: int) -> float | None:
        """Seconds since the last use; ``None``: none is remembered."""
        known = self._find(ino)
        return None if known is None else self._clock_s() - known.last_s

    def hot(self) -> list[int]:
        """Nodes that are used again and again, in order of their numbers."""
        now_s = self._clock_s()
        for ino in list(self._hot):
            known = self._find(ino)
            if known is None or known.uses_at(now_s) < HOT_USES / 2:
                del self._hot[ino]
        return sorted(self._hot)

    def _find(self, ino: int) -> _Use | None:
        return self._current.get(ino) or self._previous.get(ino)
