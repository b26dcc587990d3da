"""What a region itself notes of its blocks, so that a lost name space's files can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from crailfs.errors import InvalidError
from crailfs.records import BlockHeader, HeaderChange
from storage_server.media.superblock import Superblock


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
        from (the region's block count at its end): at the latest the next one whose header does not
        check. Raises ``DamagedError`` if that is ``first_block``, ``OSError`` if the device
        fails."""


def check_change(change: HeaderChange, path: Path, superblock: Superblock) -> None:
    """Raises ``InvalidError`` for a change that cannot be of the region at ``path``."""
    size = superblock.block_size_bytes
    possible = (
        0 <= change.block < change.block + change.block_count <= superblock.block_count
        and 0 <= change.tail_stored_bytes <= size
        and 0 <= change.tail_visible_bytes <= size
    )
    if change.ino:
        possible = (
            possible
            and len(change.checksums) == 8 * change.block_count
            and change.tail_stored_bytes >= max(1, change.tail_visible_bytes)
            and 0 < change.ino < 1 << 64
            and 0 < change.generation < 1 << 64
            and 0 <= change.file_block < (1 << 64) - change.block_count
        )
    if not possible:
        raise InvalidError(
            f"a header change that cannot be, of region {path}, which has {superblock.block_count} "
            f"blocks of {size} bytes: {change!r:.300}"
        )
