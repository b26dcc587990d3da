"""A client's map of a file's blocks is good for one version of data and places, and no other."""

from __future__ import annotations

from msgspec.structs import replace

from crailfs.client.block_map import BlockMap
from crailfs.client.cache import Node, NodeCache
from crailfs.records import Attributes, NodeKind, Placement

INO = 7
FILE = Attributes(
    ino=INO, kind=NodeKind.FILE, mode=0o644, uid=0, gid=0, nlink=1, size=70_000, block_count=2,
    atime_ns=0, mtime_ns=0, ctime_ns=0, btime_ns=0, rdev=0, parent=0, data_version=5,
    placement=Placement(), moves=2,
)  # fmt: skip


def known(cache: NodeCache) -> tuple[Node, BlockMap]:
    node = cache.store(FILE, cache.ticket())
    assert node is not None
    blocks = BlockMap(65_536)
    cache.set_blocks(node, blocks)
    return node, blocks


def test_a_map_is_taken_up_again_only_if_nothing_was_written_or_moved() -> None:
    cache = NodeCache(5_000)
    node, blocks = known(cache)
    cache.disconnect()
    cache.store(FILE, cache.ticket())
    assert cache.blocks(node) is blocks
    for changed in (replace(FILE, data_version=6), replace(FILE, moves=3)):
        cache.disconnect()
        cache.store(changed, cache.ticket())
        assert cache.blocks(node) is None


def test_a_map_outlives_ones_own_change_only_if_there_was_no_other() -> None:
    cache = NodeCache(5_000)
    node, blocks = known(cache)
    own = replace(FILE, data_version=6)
    assert cache.blocks_before(node, own, data_changes=1) is blocks
    assert cache.blocks_before(node, replace(FILE, mode=0o600), data_changes=0) is blocks
    assert cache.blocks_before(node, replace(FILE, data_version=7), data_changes=1) is None
    assert cache.blocks_before(node, replace(own, moves=3), data_changes=1) is None
