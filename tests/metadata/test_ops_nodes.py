"""lookup, get_attributes, create_node, link_node, remove_node, read_directory, release_inodes."""

from __future__ import annotations

import pytest

from crailfs.errors import (
    CrailError,
    ExistsError,
    InvalidError,
    IsADirectoryCrailError,
    NameTooLongError,
    NotADirectoryCrailError,
    NotEmptyError,
    NotFoundError,
    NotPermittedError,
    StaleError,
    TooManyLinksError,
)
from crailfs.limits import LINK_COUNT_MAX
from crailfs.records import Durability, NodeKind, StorageClass, Tier
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import Invalidation
from metadata_server import ops
from tests.metadata.name_space import NameSpace

BAD_NAMES = [b"", b".", b"..", b"a/b", b"a\0b"]


def test_a_created_file_is_found_under_its_name(space: NameSpace) -> None:
    made = space.create(b"a", mode=0o640, uid=5, gid=6)
    now_ns = space.clock.now_ns
    assert space.lookup(ROOT_INODE, b"a") == space.attributes(made.ino) == made
    assert (made.kind, made.mode, made.uid, made.gid) == (NodeKind.FILE, 0o640, 5, 6)
    assert (made.nlink, made.size, made.block_count, made.rdev) == (1, 0, 0, 0)
    assert made.atime_ns == made.mtime_ns == made.ctime_ns == made.btime_ns == now_ns


def test_lookup_of_a_missing_name_lets_the_client_cache_that(space: NameSpace) -> None:
    with pytest.raises(NotFoundError):
        space.lookup(ROOT_INODE, b"missing")
    assert space.outcome.shown == (ROOT_INODE,)


def test_lookup_below_a_file_or_a_removed_directory(space: NameSpace) -> None:
    file = space.create(b"file").ino
    with pytest.raises(NotADirectoryCrailError):
        space.lookup(file, b"x")
    gone = space.mkdir(b"gone")
    space.rmdir(b"gone", not_open=gone)
    with pytest.raises(StaleError):
        space.lookup(gone, b"x")
    with pytest.raises(StaleError):
        space.attributes(gone)


def test_dot_and_dot_dot(space: NameSpace) -> None:
    inner = space.mkdir(b"inner", space.mkdir(b"outer"))
    assert space.lookup(inner, b".").ino == inner
    assert space.lookup(inner, b"..").ino == space.lookup(ROOT_INODE, b"outer").ino
    assert space.lookup(ROOT_INODE, b"..").ino == ROOT_INODE


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_everywhere(space: NameSpace, name: bytes) -> None:
    file = space.create(b"file").ino
    for attempt in (
        lambda: space.create(name),
        lambda: space.remove(name),
        lambda: space.link(file, name),
        lambda: space.rename(ROOT_INODE, name, ROOT_INODE, b"x"),
        lambda: space.rename(ROOT_INODE, b"file", ROOT_INODE, name),
    ):
        with pytest.raises(InvalidError):
            attempt()
    assert space.names() == [b"file"]


def test_a_name_has_at_most_255_bytes(space: NameSpace) -> None:
    longest = b"n" * 255
    space.create(longest)
    assert space.lookup(ROOT_INODE, longest).nlink == 1
    for attempt in (space.create, space.remove):
        with pytest.raises(NameTooLongError):
            attempt(b"n" * 256)
    with pytest.raises(NameTooLongError):
        space.lookup(ROOT_INODE, b"n" * 256)


def test_an_existing_name_is_an_error_or_is_returned(space: NameSpace) -> None:
    file = space.create(b"file")
    directory = space.mkdir(b"dir")
    with pytest.raises(ExistsError):
        space.create(b"file")
    assert space.create(b"file", exclusive=False, mode=0) == file
    assert space.mkdir(b"dir", exclusive=False) == directory
    with pytest.raises(IsADirectoryCrailError):
        space.create(b"dir", exclusive=False)
    with pytest.raises(ExistsError):
        space.mkdir(b"file", exclusive=False)


def test_entries_change_their_directory(space: NameSpace) -> None:
    before = space.attributes(ROOT_INODE)
    space.create(b"file")
    after_file = space.attributes(ROOT_INODE)
    assert after_file.mtime_ns == after_file.ctime_ns > before.mtime_ns
    assert (after_file.size, after_file.nlink) == (1, 2)
    assert after_file.atime_ns == before.atime_ns
    space.mkdir(b"dir")
    assert (space.attributes(ROOT_INODE).size, space.attributes(ROOT_INODE).nlink) == (2, 3)
    reply = space.rmdir(b"dir")
    assert reply.parent == space.attributes(ROOT_INODE)
    assert (reply.parent.size, reply.parent.nlink) == (1, 2)


def test_what_others_must_forget(space: NameSpace) -> None:
    made = space.create(b"a")
    entry_changed = {Invalidation(ROOT_INODE, b"a", False), Invalidation(ROOT_INODE, b"", False)}
    assert set(space.outcome.invalidations) == entry_changed
    assert set(space.outcome.shown) == {ROOT_INODE, made.ino}
    space.remove(b"a")
    assert set(space.outcome.invalidations) == entry_changed | {Invalidation(made.ino, b"", True)}
    space.release(made.ino)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (NodeKind.FIFO, {}),
        (NodeKind.SOCKET, {}),
        (NodeKind.CHARACTER_DEVICE, {"rdev": 0x0103}),
        (NodeKind.BLOCK_DEVICE, {"rdev": 0x0800}),
    ],
)
def test_special_files(space: NameSpace, kind: NodeKind, more: dict[str, int]) -> None:
    made = space.create(b"special", kind=kind, **more)
    assert (made.kind, made.rdev) == (kind, more.get("rdev", 0))
    space.remove(b"special", not_open=made.ino)


def test_symlinks(space: NameSpace) -> None:
    link = space.create(b"link", kind=NodeKind.SYMLINK, target=b"../there", mode=0o777)
    assert (link.target, link.size) == (b"../there", 8)
    space.create(b"long", kind=NodeKind.SYMLINK, target=b"t" * 4095)
    with pytest.raises(NameTooLongError):
        space.create(b"longer", kind=NodeKind.SYMLINK, target=b"t" * 4096)
    for target in (b"", b"a\0b"):
        with pytest.raises(InvalidError):
            space.create(b"bad", kind=NodeKind.SYMLINK, target=target)
    with pytest.raises(InvalidError):
        space.create(b"bad", target=b"x")


def test_a_set_gid_directory_passes_its_group_on(space: NameSpace) -> None:
    directory = space.mkdir(b"shared", gid=77)
    space.set(directory, mode=0o2775)
    assert space.create(b"file", directory, gid=5).gid == 77
    child = space.create(b"dir", directory, NodeKind.DIRECTORY, 0o755, gid=5)
    assert (child.gid, child.mode) == (77, 0o2755)
    assert space.create(b"plain", gid=5).gid == 5


def test_placement_is_inherited_unless_named(space: NameSpace) -> None:
    memory = StorageClass(Tier.MEMORY, Tier.MEMORY)
    directory = space.mkdir(b"fast", storage_class=memory, durability=Durability.CLOSE)
    inherited = space.create(b"file", directory).placement
    assert (inherited.storage_class, inherited.durability) == (memory, Durability.CLOSE)
    named = space.create(b"named", directory, location="rack1", allocation_blocks=16).placement
    assert (named.storage_class, named.location, named.allocation_blocks) == (memory, "rack1", 16)
    for bad in ({"allocation_blocks": 0}, {"location": "x" * 65}, {"allocation_blocks": 5000}):
        with pytest.raises(InvalidError):
            space.create(b"bad", **bad)
    with pytest.raises(InvalidError):
        space.create(b"bad", storage_class=StorageClass(Tier.DISK, Tier.MEMORY))


@pytest.mark.parametrize("owner", [{"uid": -1}, {"gid": (1 << 32) - 1}])
def test_owners_fit_into_32_bits(space: NameSpace, owner: dict[str, int]) -> None:
    with pytest.raises(InvalidError):
        space.create(b"a", **owner)


def test_containers_hold_only_their_kind_and_are_flat(space: NameSpace) -> None:
    table = space.mkdir(b"table", kind=NodeKind.TABLE)
    multifile = space.mkdir(b"multi", kind=NodeKind.MULTIFILE)
    assert space.create(b"value", table).kind is NodeKind.KEYVALUE
    assert space.create(b"other", table, NodeKind.KEYVALUE).kind is NodeKind.KEYVALUE
    assert space.create(b"part", multifile).kind is NodeKind.FILE
    assert space.attributes(ROOT_INODE).nlink == 4
    refused = [
        (table, NodeKind.SYMLINK),
        (multifile, NodeKind.KEYVALUE),
        (multifile, NodeKind.FIFO),
        (ROOT_INODE, NodeKind.KEYVALUE),
    ]
    refused += [
        (container, kind)
        for container in (table, multifile)
        for kind in (NodeKind.DIRECTORY, NodeKind.TABLE, NodeKind.MULTIFILE)
    ]
    for container, kind in refused:
        target = b"t" if kind is NodeKind.SYMLINK else b""
        with pytest.raises(NotPermittedError):
            space.create(b"refused", container, kind, target=target)
    part = space.lookup(multifile, b"part").ino
    space.link(part, b"outside")
    with pytest.raises(NotPermittedError):
        space.link(part, b"part", table)
    with pytest.raises(NotPermittedError):
        space.link(space.lookup(table, b"value").ino, b"value")


def test_hard_links_are_one_node(space: NameSpace) -> None:
    file = space.create(b"one").ino
    linked = space.link(file, b"two")
    assert linked.nlink == 2
    assert space.lookup(ROOT_INODE, b"two") == space.lookup(ROOT_INODE, b"one") == linked
    assert linked.ctime_ns > linked.mtime_ns
    reply = space.remove(b"one", not_open=file)
    assert (reply.nlink, reply.held) == (1, False)
    assert Invalidation(file, b"", False) in space.outcome.invalidations
    assert space.attributes(file).nlink == 1
    space.remove(b"two", not_open=file)
    with pytest.raises(StaleError):
        space.attributes(file)


def test_link_refusals(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    file = space.create(b"file").ino
    with pytest.raises(NotPermittedError):
        space.link(directory, b"again")
    with pytest.raises(ExistsError):
        space.link(file, b"dir")
    with pytest.raises(NotADirectoryCrailError):
        space.link(file, b"x", file)
    space.remove(b"file")
    with pytest.raises(NotFoundError):
        space.link(file, b"back")
    space.release(file)
    with pytest.raises(StaleError):
        space.link(file, b"back")


def test_a_node_has_a_bounded_number_of_links(
    space: NameSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LINK_COUNT_MAX >= 32_000
    monkeypatch.setattr(ops._nodes, "LINK_COUNT_MAX", 4)
    file = space.create(b"l0").ino
    for name in (b"l1", b"l2", b"l3"):
        space.link(file, name)
    with pytest.raises(TooManyLinksError):
        space.link(file, b"l4")
    directory = space.mkdir(b"dir")
    for name in (b"1", b"2"):
        space.mkdir(name, directory)
    with pytest.raises(TooManyLinksError):
        space.mkdir(b"3", directory)
    space.mkdir(b"3")
    with pytest.raises(TooManyLinksError):
        space.rename(ROOT_INODE, b"3", directory, b"3")
    space.rename(ROOT_INODE, b"3", directory, b"2")


def test_remove_refusals(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    space.create(b"file", directory)
    with pytest.raises(NotFoundError):
        space.remove(b"missing")
    with pytest.raises(IsADirectoryCrailError):
        space.remove(b"dir")
    with pytest.raises(NotEmptyError):
        space.rmdir(b"dir")
    with pytest.raises(NotADirectoryCrailError):
        space.rmdir(b"file", directory)
    with pytest.raises(NotADirectoryCrailError):
        space.remove(b"x", space.lookup(directory, b"file").ino)


def test_an_unlinked_file_lives_until_its_last_holder_releases_it(space: NameSpace) -> None:
    space.add_storage()
    free = space.free_blocks
    file = space.create(b"file").ino
    space.set_xattr(file, b"user.x", b"1")
    space.write(file, 10_000)
    space.driver.holders = lambda ino, client: frozenset({99} if ino == file else ())
    reply = space.remove(b"file")
    assert (reply.ino, reply.nlink, reply.held) == (file, 0, True)
    assert space.attributes(file).nlink == 0
    space.driver.holders = lambda ino, client: frozenset()
    space.release(file)
    assert space.attributes(file).size == 10_000
    space.client_id = 99
    space.release(file, file, 12345)
    with pytest.raises(StaleError):
        space.attributes(file)
    assert space.free_blocks == free


def test_a_file_known_not_to_be_open_goes_at_once(space: NameSpace) -> None:
    space.add_storage()
    free = space.free_blocks
    file = space.create(b"file").ino
    space.write(file, 10_000)
    assert not space.remove(b"file", not_open=file).held
    assert space.free_blocks == free
    with pytest.raises(StaleError):
        space.attributes(file)


def test_nothing_can_be_made_in_a_removed_directory(space: NameSpace) -> None:
    directory = space.mkdir(b"dir")
    file = space.create(b"file").ino
    assert space.rmdir(b"dir").held
    assert space.page(directory).entries == ()
    for attempt in (
        lambda: space.create(b"x", directory),
        lambda: space.link(file, b"x", directory),
        lambda: space.rename(ROOT_INODE, b"file", directory, b"x"),
        lambda: space.lookup(directory, b"x"),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    space.release(directory)


def test_a_directory_is_read_in_pages_by_name(space: NameSpace) -> None:
    names = sorted(b"%03d" % (number * 7 % 100) for number in range(100))
    for name in reversed(names):
        space.create(name)
    first = space.page(ROOT_INODE, b"", 60)
    assert ([entry.name for entry in first.entries], first.complete) == (names[:60], False)
    second = space.page(ROOT_INODE, names[59], 60)
    assert ([entry.name for entry in second.entries], second.complete) == (names[60:], True)
    for entry in second.entries:
        assert entry.attributes == space.lookup(ROOT_INODE, entry.name)
    space.page(ROOT_INODE, names[59], 60)
    shown = {ROOT_INODE, *(entry.attributes.ino for entry in second.entries)}
    assert set(space.outcome.shown) == shown


def test_reading_goes_on_while_the_directory_changes(space: NameSpace) -> None:
    for number in range(0, 100, 2):
        space.create(b"%03d" % number)
    seen: list[bytes] = []
    complete = False
    while not complete:
        page = space.page(ROOT_INODE, seen[-1] if seen else b"", 10)
        seen += [entry.name for entry in page.entries]
        complete = page.complete
        space.remove(seen[-1], not_open=page.entries[-1].attributes.ino)
        space.create(seen[-1] + b"+")
    kept = {b"%03d" % number for number in range(0, 100, 2)}
    assert kept <= set(seen)
    assert len(seen) == len(set(seen))


def test_a_page_of_long_symlinks_fits_into_a_reply(space: NameSpace) -> None:
    for number in range(300):
        space.create(b"%04d" % number, kind=NodeKind.SYMLINK, target=b"t" * 4095)
    page = space.page(ROOT_INODE, b"", 4096)
    assert not page.complete
    assert 200 < len(page.entries) < 300
    rest = space.page(ROOT_INODE, page.entries[-1].name, 4096)
    assert len(page.entries) + len(rest.entries) == 300


def test_read_directory_refusals(space: NameSpace) -> None:
    file = space.create(b"file").ino
    with pytest.raises(NotADirectoryCrailError):
        space.page(file)
    with pytest.raises(InvalidError):
        space.page(ROOT_INODE, b"", 0)


def test_every_refusal_says_what_and_where(space: NameSpace) -> None:
    space.mkdir(b"dir")
    with pytest.raises(CrailError, match="'dir'"):
        space.create(b"dir")
    with pytest.raises(CrailError, match="'gone'"):
        space.remove(b"gone")
