"""``Attributes`` as the kernel wants them."""

from __future__ import annotations

import pyfuse3

from crailfs.records import FORMAT_BITS, Attributes

SECTOR_BYTES = 512
"""The unit of ``st_blocks``, whatever the block size."""


def fill_entry(
    entry: pyfuse3.EntryAttributes,
    attributes: Attributes,
    *,
    block_size_bytes: int,
    entry_timeout_s: float,
    attr_timeout_s: float,
) -> pyfuse3.EntryAttributes:
    """Writes every field of ``attributes`` over ``entry``, and returns it.

    The timeouts (seconds) tell how long the kernel may use the name and the attributes without
    asking again.
    """
    entry.st_ino = attributes.ino
    entry.st_mode = FORMAT_BITS[attributes.kind] | attributes.mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size
    entry.st_blksize = block_size_bytes
    entry.st_blocks = attributes.block_count * block_size_bytes // SECTOR_BYTES
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.entry_timeout = entry_timeout_s
    entry.attr_timeout = attr_timeout_s
    return entry


def missing_entry(timeout_s: float) -> pyfuse3.EntryAttributes:
    """The answer "there is no such name", which the kernel may remember for ``timeout_s``."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = timeout_s
    return entry
