"""Who may trust what they remember of which inode."""

from __future__ import annotations

from collections.abc import Iterable

NOBODY: frozenset[int] = frozenset()
INODES_MAX = 1 << 20
"""Of one generation. A client that is shown more is taken to hold a lease on every inode."""


class Leases:
    """Which clients were shown which inodes lately.

    Two generations of a dictionary from inode to a bit mask of clients. ``rotate``, called once a
    lease time, drops the older one: so a lease is remembered for one to two lease times, never
    less than the client itself trusts it. Client ids stand for themselves outside; inside, each
    has a slot, its bit in the masks.
    """

    def __init__(self, inodes_max: int = INODES_MAX) -> None:
        self._inodes_max = inodes_max
        self._current: dict[int, int] = {}
        self._previous: dict[int, int] = {}
        self._current_everything = 0
        self._previous_everything = 0
        self._bits: dict[int, int] = {}
        self._clients: list[int] = []
        """By slot; 0: the slot is free, or will be when no mask can have its bit any more."""
        self._free_slots: list[int] = []
        self._resting_slots: tuple[list[int], list[int]] = ([], [])
        """Of clients that went in this generation and in the one before."""

    def show(self, client_id: int, inodes: Iterable[int]) -> None:
        """The client is told about these inodes: its lease on each begins anew."""
        bit = self._bits.get(client_id) or self._add(client_id)
        current = self._current
        for ino in inodes:
            known = current.get(ino, 0)
            if known & bit:
                continue
            if not known and len(current) >= self._inodes_max:
                self._current_everything |= bit
                return
            current[ino] = known | bit

    def holders(self, ino: int, asking_client: int) -> frozenset[int]:
        """The clients other than ``asking_client`` that hold a lease on the inode."""
        mask = (
            self._current.get(ino, 0)
            | self._previous.get(ino, 0)
            | self._current_everything
            | self._previous_everything
        ) & ~self._bits.get(asking_client, 0)
        if not mask:
            return NOBODY
        clients = set()
        while mask:
            lowest = mask & -mask
            clients.add(self._clients[lowest.bit_length() - 1])
            mask ^= lowest
        clients.discard(0)
        return frozenset(clients)

    def rotate(self) -> None:
        """A lease time has passed since the last call, or more."""
        self._previous, self._current = self._current, {}
        self._previous_everything, self._current_everything = self._current_everything, 0
        resting, unused = self._resting_slots
        self._free_slots += unused
        self._resting_slots = [], resting

    def end(self, client_id: int) -> None:
        """The client has none any more: its session has ended."""
        bit = self._bits.pop(client_id, 0)
        if bit:
            slot = bit.bit_length() - 1
            self._clients[slot] = 0
            self._resting_slots[0].append(slot)

    @property
    def inode_count(self) -> int:
        return len(self._current) + len(self._previous)

    def _add(self, client_id: int) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
            self._clients[slot] = client_id
        else:
            slot = len(self._clients)
            self._clients.append(client_id)
        bit = self._bits[client_id] = 1 << slot
        return bit
