"""set_attributes and the four xattr operations."""

from __future__ import annotations

import pytest

from crailfs.errors import (
    AttributeSpaceError,
    ExistsError,
    InvalidError,
    IsADirectoryCrailError,
    NameTooLongError,
    NoAttributeError,
    NotPermittedError,
    NotSupportedError,
    StaleError,
    TooLargeError,
)
from crailfs.limits import FILE_SIZE_MAX_BYTES, XATTR_VALUE_MAX_BYTES
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    ExtentPage,
    GetExtents,
    GetStatistics,
    Invalidation,
    Opcode,
    Statistics,
    XattrFlag,
)
from tests.metadata.name_space import BLOCK_SIZE_BYTES, NameSpace

CRAIL_NAMES = {
    b"user.crail." + name
    for name in (
        b"storage_class", b"location", b"block_size", b"replicas", b"durability", b"pin", b"ttl",
        b"kind",
    )
}  # fmt: skip


def test_each_attribute_alone(space: NameSpace) -> None:
    made = space.create(b"file", mode=0o600, uid=1, gid=2)
    assert space.set(made.ino, mode=0o4755).mode == 0o4755
    assert space.set(made.ino, atime_ns=-5).atime_ns == -5
    changed = space.set(made.ino, mtime_ns=1 << 40)
    assert (changed.mtime_ns, changed.atime_ns, changed.mode) == (1 << 40, -5, 0o4755)
    assert changed.ctime_ns > made.ctime_ns
    owned = space.set(made.ino, uid=7)
    assert space.outcome.invalidations == (Invalidation(made.ino, b"", False),)
    assert (owned.uid, owned.gid, owned.btime_ns) == (7, 2, made.btime_ns)
    assert space.attributes(made.ino) == owned


@pytest.mark.parametrize(
    ("mode", "left"), [(0o6755, 0o755), (0o6745, 0o2745), (0o4600, 0o600), (0o1777, 0o1777)]
)
def test_a_new_owner_clears_the_set_id_bits_of_a_file(
    space: NameSpace, mode: int, left: int
) -> None:
    file = space.create(b"file").ino
    space.set(file, mode=mode)
    assert space.set(file, gid=9).mode == left
    assert space.set(file, gid=9, mode=mode).mode == mode


def test_a_new_owner_leaves_the_set_id_bits_of_a_directory(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    space.set(directory, mode=0o6755)
    assert space.set(directory, uid=9).mode == 0o6755


@pytest.mark.parametrize(
    "bad", [{"uid": -1}, {"gid": 1 << 32}, {"mtime_ns": 1 << 63}, {"atime_ns": -(1 << 63) - 1}]
)
def test_bad_attributes(space: NameSpace, bad: dict[str, int]) -> None:
    file = space.create(b"file")
    with pytest.raises((InvalidError, OverflowError)):
        space.set(file.ino, **bad)
    assert space.attributes(file.ino) == file


def test_extending_sets_the_size_only(space: NameSpace) -> None:
    made = space.create(b"file")
    longer = space.set(made.ino, size=10 * BLOCK_SIZE_BYTES + 1)
    assert (longer.size, longer.block_count) == (10 * BLOCK_SIZE_BYTES + 1, 0)
    assert longer.data_version > made.data_version
    assert longer.mtime_ns == longer.ctime_ns > made.mtime_ns


def test_cutting_gives_whole_blocks_back_and_hides_the_rest(space: NameSpace) -> None:
    space.add_storage()
    free = space.free_blocks
    file = space.create(b"file").ino
    written = space.write(file, 5 * BLOCK_SIZE_BYTES)
    cut = space.set(file, size=2 * BLOCK_SIZE_BYTES + 100)
    assert (cut.size, cut.block_count) == (2 * BLOCK_SIZE_BYTES + 100, 3)
    assert cut.data_version > written.data_version
    assert space.free_blocks == free - 3
    assert _visible_end(space, file) == cut.size
    space.set(file, size=5 * BLOCK_SIZE_BYTES)
    assert _visible_end(space, file) == cut.size
    assert space.set(file, size=0).block_count == 0
    assert space.free_blocks == free


def test_cutting_in_a_hole_hides_nothing(space: NameSpace) -> None:
    space.add_storage()
    file = space.create(b"file").ino
    space.write(file, 1000)
    space.write(file, 1000, first_block=8)
    assert space.set(file, size=4 * BLOCK_SIZE_BYTES + 1).block_count == 1
    assert _visible_end(space, file) == 1000


def test_the_same_size_changes_times_but_no_data(space: NameSpace) -> None:
    made = space.create(b"file")
    again = space.set(made.ino, size=0)
    assert again.data_version == made.data_version
    assert again.mtime_ns > made.mtime_ns
    assert space.set(made.ino, size=0, mtime_ns=5).mtime_ns == 5


def test_size_refusals(space: NameSpace) -> None:
    file = space.create(b"file").ino
    space.set(file, size=FILE_SIZE_MAX_BYTES)
    with pytest.raises(TooLargeError):
        space.set(file, size=FILE_SIZE_MAX_BYTES + 1)
    with pytest.raises(InvalidError):
        space.set(file, size=-1)
    with pytest.raises(IsADirectoryCrailError):
        space.set(ROOT_INODE, size=0)
    fifo = space.create(b"fifo", kind=NodeKind.FIFO).ino
    with pytest.raises(InvalidError):
        space.set(fifo, size=0)
    with pytest.raises(StaleError):
        space.set(4711, mode=0)


def _visible_end(space: NameSpace, ino: int) -> int:
    page: ExtentPage = space.do(Opcode.GET_EXTENTS, GetExtents(ino, 0, 1 << 20))
    last = page.extents[-1]
    end_block = last.file_block + last.block_count
    return (end_block - 1) * BLOCK_SIZE_BYTES + last.tail_visible_bytes


# --- extended attributes ------------------------------------------------------------------------


def test_xattrs_are_kept_byte_for_byte(space: NameSpace) -> None:
    file = space.create(b"file")
    for name in (b"user.a", b"trusted.b", b"security.capability", b"user.\xff"):
        space.set_xattr(file.ino, name, name + b"\0\xff")
    for name in (b"user.a", b"trusted.b", b"security.capability", b"user.\xff"):
        assert space.get_xattr(file.ino, name) == name + b"\0\xff"
    assert space.attributes(file.ino).ctime_ns > file.ctime_ns
    space.set_xattr(file.ino, b"user.a", b"")
    assert space.outcome.invalidations == (Invalidation(file.ino, b"", False),)
    assert space.get_xattr(file.ino, b"user.a") == b""
    space.remove_xattr(file.ino, b"user.a")
    with pytest.raises(NoAttributeError):
        space.get_xattr(file.ino, b"user.a")
    with pytest.raises(NoAttributeError):
        space.remove_xattr(file.ino, b"user.a")
    own = {b"trusted.b", b"security.capability", b"user.\xff"}
    assert set(space.list_xattr(file.ino)) == own | CRAIL_NAMES


def test_create_and_replace(space: NameSpace) -> None:
    file = space.create(b"file").ino
    with pytest.raises(NoAttributeError):
        space.set_xattr(file, b"user.a", b"1", XattrFlag.REPLACE)
    space.set_xattr(file, b"user.a", b"1", XattrFlag.CREATE)
    with pytest.raises(ExistsError):
        space.set_xattr(file, b"user.a", b"2", XattrFlag.CREATE)
    space.set_xattr(file, b"user.a", b"3", XattrFlag.REPLACE)
    assert space.get_xattr(file, b"user.a") == b"3"
    with pytest.raises(InvalidError):
        space.set_xattr(file, b"user.a", b"4", XattrFlag.CREATE | XattrFlag.REPLACE)


def test_xattr_names(space: NameSpace) -> None:
    file = space.create(b"file").ino
    space.set_xattr(file, b"user." + b"n" * 250, b"1")
    with pytest.raises(NameTooLongError):
        space.set_xattr(file, b"user." + b"n" * 251, b"1")
    for name in (b"system.posix_acl_access", b"other.x", b"plain", b""):
        with pytest.raises(NotSupportedError):
            space.set_xattr(file, name, b"1")
    for name in (b"user.", b"user.a\0b"):
        with pytest.raises(InvalidError):
            space.set_xattr(file, name, b"1")


def test_user_xattrs_are_for_files_and_directories(space: NameSpace) -> None:
    link = space.create(b"link", kind=NodeKind.SYMLINK, target=b"t").ino
    fifo = space.create(b"fifo", kind=NodeKind.FIFO).ino
    for node in (link, fifo):
        with pytest.raises(NotPermittedError):
            space.set_xattr(node, b"user.a", b"1")
        assert space.list_xattr(node) == ()
        space.set_xattr(node, b"trusted.a", b"1")
        assert space.list_xattr(node) == (b"trusted.a",)
    space.set_xattr(ROOT_INODE, b"user.a", b"1")


def test_xattr_space_is_bounded(space: NameSpace) -> None:
    file = space.create(b"file").ino
    with pytest.raises(AttributeSpaceError):
        space.set_xattr(file, b"user.big", b"x" * (XATTR_VALUE_MAX_BYTES + 1))
    largest = b"x" * (XATTR_VALUE_MAX_BYTES - 20)
    for number in range(4):
        space.set_xattr(file, b"user.%d" % number, largest)
    with pytest.raises(AttributeSpaceError):
        space.set_xattr(file, b"user.more", b"x" * 100)
    assert b"user.more" not in space.list_xattr(file)
    assert space.get_xattr(file, b"user.3") == largest


def test_xattrs_go_with_their_node(space: NameSpace) -> None:
    file = space.create(b"file").ino
    space.set_xattr(file, b"user.a", b"1")
    space.remove(b"file", not_open=file)
    assert space.driver.audit().counts.get("xattrs", 0) == 0


def test_placement_as_xattrs(space: NameSpace) -> None:
    file = space.create(b"file").ino
    shown = {name: space.get_xattr(file, name) for name in CRAIL_NAMES}
    assert shown == {
        b"user.crail.storage_class": b"any",
        b"user.crail.location": b"",
        b"user.crail.block_size": b"%d" % BLOCK_SIZE_BYTES,
        b"user.crail.replicas": b"1",
        b"user.crail.durability": b"fsync",
        b"user.crail.pin": b"false",
        b"user.crail.ttl": b"0",
        b"user.crail.kind": b"file",
    }
    changes = {
        b"user.crail.storage_class": b"memory>disk",
        b"user.crail.location": b"rack7",
        b"user.crail.block_size": b"%d" % (16 * BLOCK_SIZE_BYTES),
        b"user.crail.durability": b"close",
        b"user.crail.pin": b"true",
        b"user.crail.ttl": b"3600",
    }
    for name, value in changes.items():
        space.set_xattr(file, name, value)
        assert space.get_xattr(file, name) == value
    assert space.attributes(file).placement.allocation_blocks == 16
    for name in changes:
        space.remove_xattr(file, name)
    assert {name: space.get_xattr(file, name) for name in CRAIL_NAMES} == shown


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"0", 0), (b"45", 45), (b"45s", 45), (b"90m", 5_400), (b"12h", 43_200), (b"7d", 604_800)],
)
def test_a_time_to_live_may_have_a_unit(space: NameSpace, value: bytes, seconds: int) -> None:
    scratch = space.mkdir(b"scratch")
    space.set_xattr(scratch, b"user.crail.ttl", value)
    assert space.get_xattr(scratch, b"user.crail.ttl") == b"%d" % seconds


def test_pin_and_time_to_live_are_inherited(space: NameSpace) -> None:
    scratch = space.mkdir(b"scratch")
    space.set_xattr(scratch, b"user.crail.ttl", b"1h")
    space.set_xattr(scratch, b"user.crail.pin", b"true")
    inner = space.mkdir(b"inner", scratch)
    file = space.create(b"file", inner).ino
    for ino in (inner, file):
        assert space.get_xattr(ino, b"user.crail.ttl") == b"3600"
        assert space.get_xattr(ino, b"user.crail.pin") == b"true"
    space.remove_xattr(file, b"user.crail.ttl")
    assert space.get_xattr(file, b"user.crail.ttl") == b"0"


def test_a_directorys_placement_goes_back_to_its_parents(space: NameSpace) -> None:
    outer = space.mkdir(b"outer", location="here")
    inner = space.mkdir(b"inner", outer)
    space.set_xattr(inner, b"user.crail.location", b"there")
    space.remove_xattr(inner, b"user.crail.location")
    assert space.get_xattr(inner, b"user.crail.location") == b"here"
    space.remove_xattr(outer, b"user.crail.location")
    assert space.get_xattr(outer, b"user.crail.location") == b""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"storage_class", b"tape"),
        (b"storage_class", b"disk>memory"),
        (b"location", b"x" * 65),
        (b"location", b"\xff"),
        (b"block_size", b"0"),
        (b"block_size", b"4097"),
        (b"block_size", b"-4096"),
        (b"block_size", b"many"),
        (b"block_size", b"9" * 19),
        (b"replicas", b"2"),
        (b"replicas", b"0"),
        (b"durability", b"never"),
        (b"pin", b"yes"),
        (b"ttl", b""),
        (b"ttl", b"d"),
        (b"ttl", b"-1"),
        (b"ttl", b"1.5h"),
        (b"ttl", b"36601d"),
        (b"unknown", b"1"),
    ],
)
def test_placement_values_that_cannot_be(space: NameSpace, name: bytes, value: bytes) -> None:
    file = space.create(b"file")
    with pytest.raises(InvalidError):
        space.set_xattr(file.ino, b"user.crail." + name, value)
    assert space.attributes(file.ino) == file


@pytest.mark.parametrize("value", [b"10x", b"1.5h", b"h"])
def test_who_sets_a_time_to_live_is_told_its_units(space: NameSpace, value: bytes) -> None:
    with pytest.raises(InvalidError, match="seconds, nor one with s, m, h or d behind it"):
        space.set_xattr(space.create(b"file").ino, b"user.crail.ttl", value)


def test_the_kind_is_shown_and_never_changes(space: NameSpace) -> None:
    table = space.mkdir(b"table", kind=NodeKind.TABLE)
    assert space.get_xattr(table, b"user.crail.kind") == b"table"
    space.set_xattr(table, b"user.crail.kind", b"table")
    with pytest.raises(NotPermittedError):
        space.set_xattr(table, b"user.crail.kind", b"directory")
    with pytest.raises(NotPermittedError):
        space.remove_xattr(table, b"user.crail.kind")
    with pytest.raises(NoAttributeError):
        space.get_xattr(table, b"user.crail.unknown")


def test_statistics_count_nodes_and_blocks(space: NameSpace) -> None:
    space.add_storage(block_count=64)
    file = space.create(b"file").ino
    space.write(file, 3 * BLOCK_SIZE_BYTES)
    statistics: Statistics = space.do(Opcode.GET_STATISTICS, GetStatistics())
    assert (statistics.block_size_bytes, statistics.node_count) == (BLOCK_SIZE_BYTES, 2)
    (tier,) = statistics.tiers
    assert (tier.total_blocks, tier.free_blocks) == (64, 61)
