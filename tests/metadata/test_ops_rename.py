"""rename_node: every rule of rename(2) and of its flags."""

from __future__ import annotations

import pytest

from crailfs.errors import (
    ExistsError,
    InvalidError,
    IsADirectoryCrailError,
    NotADirectoryCrailError,
    NotEmptyError,
    NotFoundError,
    NotPermittedError,
    StaleError,
)
from crailfs.records import NodeKind
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Invalidation, RenameFlag
from tests.metadata.name_space import NameSpace

R = ROOT_INODE


def test_a_file_moves_with_all_it_is(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    file = space.create(b"a")
    before = space.attributes(R)
    reply = space.rename(R, b"a", directory, b"b")
    assert space.lookup(directory, b"b") == reply.moved
    assert reply.moved.ino == file.ino
    assert reply.moved.mtime_ns == file.mtime_ns
    assert reply.moved.ctime_ns > file.ctime_ns
    assert reply.replaced_ino == 0
    with pytest.raises(NotFoundError):
        space.lookup(R, b"a")
    assert reply.parent == space.attributes(R)
    assert reply.new_parent == space.attributes(directory)
    for parent in (reply.parent, reply.new_parent):
        assert parent.mtime_ns == parent.ctime_ns > before.mtime_ns
    assert (reply.parent.size, reply.new_parent.size) == (1, 1)


def test_others_forget_both_names_and_the_node(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    file = space.create(b"a").ino
    space.rename(R, b"a", directory, b"b")
    assert {
        Invalidation(R, b"a", False),
        Invalidation(R, b"", False),
        Invalidation(directory, b"b", False),
        Invalidation(directory, b"", False),
        Invalidation(file, b"", False),
    } == set(space.outcome.invalidations)


def test_a_directory_takes_its_parent_link_along(space: NameSpace) -> None:
    old, new = space.mkdir(b"old"), space.mkdir(b"new")
    moved = space.mkdir(b"d", old)
    reply = space.rename(old, b"d", new, b"e")
    assert (reply.parent.nlink, reply.new_parent.nlink) == (2, 3)
    assert reply.moved.parent == new
    assert space.lookup(moved, b"..").ino == new


def test_within_one_directory(space: NameSpace) -> None:
    space.mkdir(b"d")
    space.create(b"a")
    reply = space.rename(R, b"d", R, b"e")
    assert reply.parent == reply.new_parent == space.attributes(R)
    assert (reply.parent.size, reply.parent.nlink) == (2, 3)
    assert space.names() == [b"a", b"e"]


def test_a_file_replaces_a_file(space: NameSpace) -> None:
    moved, replaced = space.create(b"a").ino, space.create(b"b").ino
    reply = space.rename(R, b"a", R, b"b", not_open=replaced)
    assert (reply.replaced_ino, reply.replaced_held) == (replaced, False)
    assert space.lookup(R, b"b").ino == moved
    assert space.attributes(R).size == 1
    with pytest.raises(StaleError):
        space.attributes(replaced)


def test_a_replaced_file_that_may_be_open_is_held(space: NameSpace) -> None:
    space.create(b"a")
    replaced = space.create(b"b").ino
    assert space.rename(R, b"a", R, b"b").replaced_held
    assert Invalidation(replaced, b"", True) in space.outcome.invalidations
    assert space.attributes(replaced).nlink == 0
    space.release(replaced)


def test_a_replaced_hard_link_lives_on(space: NameSpace) -> None:
    file = space.create(b"one").ino
    space.link(file, b"two")
    space.create(b"a")
    reply = space.rename(R, b"a", R, b"two")
    assert (reply.replaced_ino, reply.replaced_held) == (file, False)
    assert space.attributes(file).nlink == 1


def test_a_directory_replaces_an_empty_one_only(space: NameSpace) -> None:
    moved, empty, full = space.mkdir(b"d"), space.mkdir(b"empty"), space.mkdir(b"full")
    space.create(b"x", full)
    with pytest.raises(NotEmptyError):
        space.rename(R, b"d", R, b"full")
    reply = space.rename(R, b"d", R, b"empty", not_open=empty)
    assert space.lookup(R, b"empty").ino == moved
    assert (reply.new_parent.size, reply.new_parent.nlink) == (2, 4)
    reply = space.rename(R, b"empty", full, b"in")
    assert (reply.parent.nlink, reply.new_parent.nlink) == (3, 3)


def test_a_directory_replaces_one_of_another_parent(space: NameSpace) -> None:
    space.mkdir(b"d")
    outer = space.mkdir(b"outer")
    inner = space.mkdir(b"inner", outer)
    reply = space.rename(R, b"d", outer, b"inner", not_open=inner)
    assert (reply.parent.nlink, reply.new_parent.nlink) == (3, 3)
    assert reply.new_parent.size == 1


def test_files_and_directories_do_not_replace_each_other(space: NameSpace) -> None:
    space.mkdir(b"d")
    space.create(b"f")
    with pytest.raises(IsADirectoryCrailError):
        space.rename(R, b"f", R, b"d")
    with pytest.raises(NotADirectoryCrailError):
        space.rename(R, b"d", R, b"f")
    assert space.names() == [b"d", b"f"]


def test_a_directory_cannot_move_into_itself(space: NameSpace) -> None:
    outer = space.mkdir(b"outer")
    inner = space.mkdir(b"inner", outer)
    space.create(b"file", inner)
    for new_parent in (outer, inner):
        with pytest.raises(InvalidError):
            space.rename(R, b"outer", new_parent, b"x")
    with pytest.raises(InvalidError):
        space.rename(R, b"outer", outer, b"inner", RenameFlag.EXCHANGE)
    with pytest.raises(InvalidError):
        space.rename(outer, b"inner", R, b"outer", RenameFlag.EXCHANGE)
    with pytest.raises(NotEmptyError):
        space.rename(outer, b"inner", R, b"outer")


def test_two_names_of_one_node_stay_as_they_are(space: NameSpace) -> None:
    file = space.create(b"one").ino
    space.link(file, b"two")
    before = space.attributes(R)
    assert space.rename(R, b"one", R, b"two").replaced_ino == 0
    space.rename(R, b"one", R, b"one")
    space.rename(R, b"one", R, b"two", RenameFlag.EXCHANGE)
    assert space.attributes(R) == before
    assert space.attributes(file).nlink == 2


def test_no_replace(space: NameSpace) -> None:
    space.create(b"a")
    space.create(b"b")
    for new_name in (b"b", b"a"):
        with pytest.raises(ExistsError):
            space.rename(R, b"a", R, new_name, RenameFlag.NO_REPLACE)
    space.rename(R, b"a", R, b"c", RenameFlag.NO_REPLACE)
    assert space.names() == [b"b", b"c"]
    with pytest.raises(InvalidError):
        space.rename(R, b"b", R, b"c", RenameFlag.NO_REPLACE | RenameFlag.EXCHANGE)


def test_exchange_of_files(space: NameSpace) -> None:
    a, b = space.create(b"a").ino, space.create(b"b").ino
    space.rename(R, b"a", R, b"b", RenameFlag.EXCHANGE)
    assert (space.lookup(R, b"a").ino, space.lookup(R, b"b").ino) == (b, a)
    with pytest.raises(NotFoundError):
        space.rename(R, b"a", R, b"missing", RenameFlag.EXCHANGE)


def test_exchange_of_a_directory_and_a_file(space: NameSpace) -> None:
    old, new = space.mkdir(b"old"), space.mkdir(b"new")
    directory = space.mkdir(b"d", old)
    file = space.create(b"f", new).ino
    inside = space.create(b"inside", directory).ino
    reply = space.rename(old, b"d", new, b"f", RenameFlag.EXCHANGE)
    assert space.lookup(old, b"d").ino == file
    assert space.lookup(new, b"f").ino == directory
    assert (reply.parent.nlink, reply.new_parent.nlink) == (2, 3)
    assert (reply.parent.size, reply.new_parent.size) == (1, 1)
    assert space.lookup(directory, b"..").ino == new
    assert space.lookup(directory, b"inside").ino == inside


def test_containers_are_not_left_or_entered_by_the_wrong_kind(space: NameSpace) -> None:
    table = space.mkdir(b"table", kind=NodeKind.TABLE)
    other = space.mkdir(b"other", kind=NodeKind.TABLE)
    multifile = space.mkdir(b"multi", kind=NodeKind.MULTIFILE)
    space.create(b"value", table)
    space.create(b"file")
    space.mkdir(b"dir")
    for parent, name, new_parent in (
        (table, b"value", R),
        (table, b"value", multifile),
        (R, b"file", table),
        (R, b"dir", multifile),
        (R, b"other", multifile),
    ):
        with pytest.raises(NotPermittedError):
            space.rename(parent, name, new_parent, b"x")
    with pytest.raises(NotPermittedError):
        space.rename(R, b"file", table, b"value", RenameFlag.EXCHANGE)
    space.rename(table, b"value", other, b"value")
    space.rename(R, b"file", multifile, b"file")
    space.rename(multifile, b"file", R, b"file")


def test_rename_refusals(space: NameSpace) -> None:
    file = space.create(b"file").ino
    with pytest.raises(NotFoundError):
        space.rename(R, b"missing", R, b"x")
    with pytest.raises(NotADirectoryCrailError):
        space.rename(R, b"file", file, b"x")
    gone = space.mkdir(b"gone")
    space.rmdir(b"gone", not_open=gone)
    with pytest.raises(StaleError):
        space.rename(R, b"file", gone, b"x")
