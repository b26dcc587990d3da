"""The audit finds each kind of damage, says which, and finds nothing in a sound name space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from crailfs.records import Attributes, Extent, Location, NodeKind
from crailfs.units import ROOT_INODE
from metadata_server import audit, audit_windows, schema
from metadata_server.audit_windows import LinkWindow, block_windows
from metadata_server.schema import Granted, Usage
from metadata_server.txn import Txn
from tests.metadata.name_space import BLOCK_SIZE_BYTES, CLIENT, NameSpace

REGION = 1


class Damaged(NameSpace):
    """A name space with one of everything, and short ways to break it."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self.add_storage(block_count=64)
        self.directory = self.mkdir(b"dir")
        self.inner = self.mkdir(b"inner", self.directory)
        self.file = self.create(b"file", self.directory).ino
        self.write(self.file, 5 * BLOCK_SIZE_BYTES)
        self.write(self.file, 100, first_block=9)
        self.table = self.mkdir(b"table", kind=NodeKind.TABLE)
        self.value = self.create(b"value", self.table).ino
        self.orphan = self.create(b"orphan").ino
        self.remove(b"orphan")
        self.set_xattr(self.file, b"user.a", b"1")
        self.assert_sound()

    def findings(self, damage: Callable[[Txn], object]) -> str:
        self.driver.run(lambda txn, _: damage(txn))
        return "\n".join(self.driver.audit().findings)

    def change(self, ino: int, **changes: object) -> str:
        return self.findings(lambda txn: txn.put_node(_with(txn.node(ino), **changes)))

    def put(self, table: bytes, key: bytes, value: bytes) -> str:
        return self.findings(lambda txn: txn.put(table, key, value))

    def delete(self, table: bytes, key: bytes) -> str:
        return self.findings(lambda txn: txn.delete(table, key))

    def change_extent(self, at: int, /, **changes: object) -> str:
        key = schema.extent_key(self.file, at)

        def damage(txn: Txn) -> None:
            value = txn.get(schema.EXTENTS, key)
            assert value is not None
            extent: Extent = replace(schema.decode_extent(value), **changes)
            txn.put(schema.EXTENTS, key, schema.encode(extent))

        return self.findings(damage)


def _with(node: Attributes, **changes: object) -> Attributes:
    changed: Attributes = replace(node, **changes)
    return changed


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Damaged]:
    space = Damaged(tmp_path / "state")
    yield space
    space.driver.close()


def test_counts(damaged: Damaged) -> None:
    assert damaged.driver.audit().counts == {
        "directory_nodes": 3,
        "file_nodes": 2,
        "table_nodes": 1,
        "keyvalue_nodes": 1,
        "entries": 5,
        "orphans": 1,
        "xattrs": 1,
        "extents": 2,
        "free_blocks": 58,
        "owned_blocks": 6,
    }


def test_node_count(damaged: Damaged) -> None:
    assert "node_count is 99" in damaged.findings(lambda txn: txn.set_state(b"node_count", 99))


def test_next_ino(damaged: Damaged) -> None:
    assert "next_ino" in damaged.findings(lambda txn: txn.set_state(b"next_ino", 3))


# --- I3, I4, I5, I7 -----------------------------------------------------------------------------


def test_an_entry_without_a_node(damaged: Damaged) -> None:
    found = damaged.delete(schema.NODES, schema.node_key(damaged.value))
    assert f"points to inode {damaged.value}, which does not exist" in found


@pytest.mark.parametrize("ino", [0, 1 << 60])
def test_an_entry_for_an_impossible_node(damaged: Damaged, ino: int) -> None:
    found = damaged.put(schema.ENTRIES, schema.entry_key(ROOT_INODE, b"x"), schema.ino_value(ino))
    assert f"points to inode {ino}, which does not exist" in found


def test_a_node_without_a_name(damaged: Damaged) -> None:
    found = damaged.delete(schema.ENTRIES, schema.entry_key(damaged.directory, b"file"))
    assert f"inode {damaged.file} should have 1 names and has 0" in found
    assert f"directory {damaged.directory} says 2 entries and has 1" in found


def test_a_wrong_link_count(damaged: Damaged) -> None:
    assert "should have 2 names and has 1" in damaged.change(damaged.file, nlink=2)


def test_a_directory_with_two_names(damaged: Damaged) -> None:
    found = damaged.put(
        schema.ENTRIES, schema.entry_key(ROOT_INODE, b"again"), schema.ino_value(damaged.inner)
    )
    assert f"inode {damaged.inner} should have 1 names and has 2" in found
    assert f"has {damaged.directory} as its parent" in found


def test_a_directorys_link_count(damaged: Damaged) -> None:
    found = damaged.change(damaged.directory, nlink=2)
    assert f"directory {damaged.directory} has nlink 2" in found


def test_a_directorys_size(damaged: Damaged) -> None:
    assert "says 7 entries and has 2" in damaged.change(damaged.directory, size=7)


def test_a_wrong_parent(damaged: Damaged) -> None:
    found = damaged.change(damaged.inner, parent=ROOT_INODE)
    assert f"inode {damaged.inner} has {ROOT_INODE} as its parent" in found


def test_a_loop_apart_from_the_root(damaged: Damaged) -> None:
    def make_loop(txn: Txn) -> None:
        txn.delete(schema.ENTRIES, schema.entry_key(ROOT_INODE, b"dir"))
        key = schema.entry_key(damaged.inner, b"dir")
        txn.put(schema.ENTRIES, key, schema.ino_value(damaged.directory))
        root, inner = txn.node(ROOT_INODE), txn.node(damaged.inner)
        txn.put_node(_with(root, nlink=root.nlink - 1, size=root.size - 1))
        txn.put_node(_with(inner, nlink=3, size=1))
        txn.put_node(_with(txn.node(damaged.directory), parent=damaged.inner))

    found = damaged.findings(make_loop)
    for ino in (damaged.directory, damaged.inner):
        assert f"directory {ino} cannot be reached from the root" in found


def test_entries_of_what_is_no_directory(damaged: Damaged) -> None:
    key = schema.entry_key(damaged.file, b"x")
    found = damaged.put(schema.ENTRIES, key, schema.ino_value(damaged.value))
    assert "1 entries are in no directory that exists" in found


def test_orphans(damaged: Damaged) -> None:
    key = schema.orphan_key(damaged.orphan, CLIENT)
    assert f"inode {damaged.orphan} has no name" in damaged.delete(schema.ORPHANS, key)


def test_orphans_that_are_none(damaged: Damaged) -> None:
    found = damaged.put(schema.ORPHANS, schema.orphan_key(damaged.file, CLIENT), b"")
    assert f"holds inode {damaged.file}, which has 1 names" in found
    found = damaged.put(schema.ORPHANS, schema.orphan_key(9999, CLIENT), b"")
    assert "holds inode 9999, which does not exist" in found


def test_what_containers_hold(damaged: Damaged) -> None:
    assert "a FILE cannot be in a TABLE" in damaged.change(damaged.value, kind=NodeKind.FILE)
    found = damaged.change(damaged.file, kind=NodeKind.KEYVALUE)
    assert "a KEYVALUE cannot be in a DIRECTORY" in found


def test_xattrs_of_nothing(damaged: Damaged) -> None:
    found = damaged.put(schema.XATTRS, schema.xattr_key(9999, b"user.a"), b"1")
    assert "inode 9999 has extended attributes and is gone" in found


# --- I6 -----------------------------------------------------------------------------------------


def test_block_counts(damaged: Damaged) -> None:
    assert "says 7 blocks and has 6" in damaged.change(damaged.file, block_count=7)
    assert "says 3 blocks and has no extents" in damaged.change(damaged.value, block_count=3)


def test_extents_of_nothing(damaged: Damaged) -> None:
    found = damaged.delete(schema.NODES, schema.node_key(damaged.file))
    assert f"inode {damaged.file} has extents and is not a file" in found


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"file_block": 8}, "its key names another block"),
        ({"block_count": 129}, "it has 129 blocks"),
        ({"checksums": b"1234567"}, "7 bytes of checksums for 1 blocks"),
        ({"replicas": ()}, "it has 0 replicas"),
        ({"tail_visible_bytes": 101}, "shows 101 bytes of 100 stored"),
        ({"tail_visible_bytes": 0}, "shows 0 bytes of 100 stored"),
        ({"tail_visible_bytes": 200, "tail_stored_bytes": 200}, "shows bytes up to"),
        ({"replicas": (Location(REGION, 5, 999),)}, "its generation 999 was never given"),
    ],
)
def test_bad_extents(damaged: Damaged, changes: dict[str, object], finding: str) -> None:
    assert finding in damaged.change_extent(9, **changes)


def test_extents_that_overlap(damaged: Damaged) -> None:
    found = damaged.change_extent(0, block_count=10)
    assert "extent at file block 9: overlaps the one before, which ends at 10" in found


# --- I1, I2, I8, I9 -----------------------------------------------------------------------------


def test_a_block_of_two(damaged: Damaged) -> None:
    found = damaged.put(
        schema.RECLAIM, schema.reclaim_key(1, REGION, 2), schema.encode(Granted(2, 0, 0))
    )
    assert f"region {REGION}, blocks 2 to 3 (reclaim)" in found or "blocks 0 to 4 (owned)" in found
    assert "somebody else has some of them too" in found


def test_blocks_of_nobody(damaged: Damaged) -> None:
    def lose(txn: Txn) -> None:
        ((key, value),) = txn.scan(schema.FREE)
        txn.put(schema.FREE, key, (schema.unpack_u64(value) - 3).to_bytes(8))

    found = damaged.findings(lose)
    assert f"region {REGION}, blocks 61 to 63: nobody has them" in found
    assert "usage says 58 free, 0 to reclaim and 0 to clear, there are 55, 0 and 0" in found


def test_blocks_that_are_none(damaged: Damaged) -> None:
    for region, block in ((REGION, 64), (99, 0)):
        found = damaged.put(schema.FREE, schema.free_key(region, block), (1).to_bytes(8))
        assert f"region {region}, blocks {block} to {block} (free): not within" in found


def test_free_runs_that_touch(damaged: Damaged) -> None:
    def split(txn: Txn) -> None:
        ((key, value),) = txn.scan(schema.FREE)
        region, block = schema.unpack_region_block(key)
        txn.put(schema.FREE, key, (3).to_bytes(8))
        rest = schema.unpack_u64(value) - 3
        txn.put(schema.FREE, schema.free_key(region, block + 3), rest.to_bytes(8))

    assert "the free runs before and at block 9 touch" in damaged.findings(split)


def test_a_grant_without_a_session(damaged: Damaged) -> None:
    key = schema.grant_key(0xABC, REGION, 5)
    found = damaged.put(schema.GRANTS, key, schema.encode(Granted(1, 1, 0xABC)))
    assert "client 0000000000000abc has granted blocks and no session" in found


def test_sums(damaged: Damaged) -> None:
    usage = Usage(free_blocks=58, reclaim_blocks=1, high_water_blocks=6)
    found = damaged.put(schema.USAGE, schema.region_key(REGION), schema.encode(usage))
    assert "usage says 58 free, 1 to reclaim and 0 to clear, there are 58, 0 and 0" in found
    usage = Usage(free_blocks=58, reclaim_blocks=0, high_water_blocks=2)
    found = damaged.put(schema.USAGE, schema.region_key(REGION), schema.encode(usage))
    assert "block 5 is above the high water mark 2" in found


# --- bounds -------------------------------------------------------------------------------------


def test_findings_are_bounded(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FINDINGS_MAX", 3)
    found = damaged.change(damaged.file, nlink=9, block_count=9, size=0)
    assert len(found.splitlines()) == 4
    assert found.endswith("more findings are not shown")


def test_small_windows_find_the_same(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = damaged.put(schema.FREE, schema.free_key(REGION, 40), (1).to_bytes(8))
    missing = damaged.delete(schema.NODES, schema.node_key(damaged.value))
    whole = damaged.driver.audit()
    assert nobody
    assert missing
    monkeypatch.setattr(audit, "LinkWindow", _small_link_window)
    monkeypatch.setattr(audit, "block_windows", lambda usable: block_windows(usable, limit=7))
    small = damaged.driver.audit()
    assert set(small.findings) == set(whole.findings)
    assert small.counts == whole.counts


def _small_link_window(nodes: Iterator[Attributes], *, after: int = -1) -> LinkWindow:
    return LinkWindow(nodes, after=after, limit=1)


def test_block_windows_cover_all_and_stay_small() -> None:
    windows = list(block_windows({1: 10, 2: 3, 3: 0, 4: 25}, limit=8))
    assert [window.first for window in windows] == [True] + [False] * (len(windows) - 1)
    uncovered = [span for window in windows for span in window.unclaimed()]
    assert sum(count for _, _, count in uncovered) == 38
    per_window = [sum(count for _, _, count in window.unclaimed()) for window in windows]
    assert max(per_window) == 8
    assert audit_windows.WINDOW_BLOCKS > 8
