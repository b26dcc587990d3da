"""Names for the kinds of number that the whole project exchanges.

A ``NewType`` costs nothing at run time and lets the type checker refuse an inode number where a
region is wanted.
"""

from typing import Final, NewType

InodeNumber = NewType("InodeNumber", int)
"""64 bits: the metadata shard in the high 16, a counter that is never reused in the low 48."""

RegionId = NewType("RegionId", int)
"""A region of one storage server's medium; given once by the metadata server, never reused."""

RegionBlock = NewType("RegionBlock", int)
"""The index of a block within its region, from 0."""

FileBlock = NewType("FileBlock", int)
"""The index of a block within its file: file offset // block size."""

Generation = NewType("Generation", int)
"""Given to each grant of blocks, ever increasing; tells the owners of one block apart."""

ClientId = NewType("ClientId", int)
"""64 random bits that a client library instance chooses when it starts."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
NANOSECONDS_PER_SECOND: Final = 1_000_000_000

ROOT_INODE: Final = InodeNumber(1)
SHARD_SHIFT: Final = 48
"""How far the shard is shifted up in an inode number; shard 0 is the only one today."""


def blocks_for(size_bytes: int, block_size_bytes: int) -> int:
    """How many blocks of ``block_size_bytes`` hold ``size_bytes`` (both in bytes)."""
    return -(-size_bytes // block_size_bytes)


def format_bytes(size_bytes: int) -> str:
    """``size_bytes`` for people: binary units, one decimal where it says something."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            decimals = 0 if unit == "B" or amount >= 100 else 1
            return f"{amount:.{decimals}f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")
