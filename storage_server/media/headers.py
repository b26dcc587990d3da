"""What a region itself notes of its blocks, so that a lost name space's files can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from crailfs.records import BlockHeader, HeaderChange


class HeaderStore(Protocol):
    """What a region notes of each of its blocks: see ``BlockHeader``. Calls wait for the device:
    make them in a thread, one at a time."""

    applied_sequence: int
    """Of the last change that is durable here; 0: none yet."""
    held_blocks: int
    """How many headers are in use."""

    def apply(self, changes: Sequence[HeaderChange], last_sequence: int) -> None:
        """Make the changes and ``applied_sequence`` durable, all or nothing whatever happens
        meanwhile; the bytes of blocks that become a file's are made durable before. Applying
        the same changes again changes nothing. Raises ``OSError`` if the device fails."""

    def read(self, first_block: int, header_limit: int) -> tuple[list[BlockHeader], int]:
        """Headers in use from ``first_block`` on, at most ``header_limit``, and the block to go on
        from (the region's block count at its end). Raises ``DamagedError`` for one that does not
        check, ``OSError`` if the device fails."""
