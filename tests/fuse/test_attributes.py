"""Attributes as the kernel gets them."""

from __future__ import annotations

import stat

import pyfuse3
import pytest

from crailfs.records import Attributes, NodeKind, Placement
from fuse_client.attributes import fill_entry
from fuse_client.privileges import mode_without_set_id

NODE = Attributes(
    ino=1 << 50, kind=NodeKind.FILE, mode=0o4755, uid=4_000_000_000, gid=7, nlink=3,
    size=10**13, block_count=3, atime_ns=-1, mtime_ns=-1_500_000_000, ctime_ns=9 * 10**18,
    btime_ns=0, rdev=0, parent=0, data_version=1, placement=Placement(),
)  # fmt: skip


def test_every_field_arrives() -> None:
    entry = fill_entry(
        pyfuse3.EntryAttributes(),
        NODE,
        block_size_bytes=65536,
        entry_timeout_s=1.5,
        attr_timeout_s=2.5,
    )
    assert entry.st_ino == 1 << 50
    assert entry.st_mode == stat.S_IFREG | 0o4755
    assert (entry.st_uid, entry.st_gid, entry.st_nlink) == (4_000_000_000, 7, 3)
    assert (entry.st_size, entry.st_blocks) == (10**13, 3 * 128)
    assert entry.st_atime_ns == -1
    assert entry.st_mtime_ns == -1_500_000_000
    assert entry.st_ctime_ns == 9 * 10**18
    assert (entry.entry_timeout, entry.attr_timeout) == (1.5, 2.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o6777, 0o777), (0o4644, 0o644), (0o2644, 0o2644), (0o2610, 0o610), (0o1755, 0o1755)],
)
def test_set_id_bits_that_a_change_takes_away(before: int, after: int) -> None:
    assert mode_without_set_id(before) == after
