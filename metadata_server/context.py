"""What an operation knows besides tables and request, and what it says besides its reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from crailfs.wire.messages import Invalidation


def no_holders(ino: int) -> frozenset[int]:
    """For internal operations and tests: nobody caches anything."""
    return frozenset()


@dataclass(slots=True)
class Context:
    """One operation's surroundings; made anew for each."""

    client_id: int
    """Who asks; 0: the server itself."""
    now_ns: int
    """The operation's time stamp, nanoseconds since the epoch."""
    block_size_bytes: int
    """Of the cluster."""
    holders: Callable[[int], frozenset[int]] = no_holders
    """The *other* clients that hold a lease on an inode."""
    header_regions: frozenset[int] = frozenset()
    """The regions that keep headers: their ``header_log`` has to be told of what happens there."""
    settling_regions: frozenset[int] = frozenset()
    """Those whose bytes outlive a power cut, without headers: what leaves a file there is free only
    when the journal is synced, since a power cut could give it back to the file."""
    synced_header_changes: int = (1 << 64) - 1
    """Header changes with sequences below this outlive a power cut."""
    invalidations: list[Invalidation] = field(default_factory=list)
    """What the operation changed and others may have cached."""
    shown: list[int] = field(default_factory=list)
    """Inodes that the reply tells the client about: it gets a lease on each. A directory is shown
    by its listing and by every lookup in it, found or not, since the answer may be cached."""

    def changed(self, ino: int) -> None:
        """The attributes or the bytes of ``ino`` are not what others may remember."""
        self.invalidations.append(Invalidation(ino, b"", False))

    def changed_entry(self, parent: int, name: bytes) -> None:
        """The entry ``name`` of ``parent`` came, went or points elsewhere; ``parent``'s own
        attributes change with it."""
        self.invalidations.append(Invalidation(parent, name, False))
        self.invalidations.append(Invalidation(parent, b"", False))

    def unlinked(self, ino: int) -> None:
        """``ino`` has lost its last name and lives on as an orphan."""
        self.invalidations.append(Invalidation(ino, b"", True))
