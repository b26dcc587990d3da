"""CommitFile, GetExtents, PutKeyValue: what becomes of a file's blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from crailfs.errors import (
    ConflictError,
    CrailError,
    FencedError,
    InvalidError,
    NotPermittedError,
    StaleError,
    TooLargeError,
)
from crailfs.limits import EXTENT_BLOCKS_MAX, FILE_SIZE_MAX_BYTES
from crailfs.records import ANY_TIER, Attributes, Extent, Location, NodeKind, Run
from crailfs.units import ROOT_INODE
from crailfs.wire.messages import (
    BaseBlock,
    CommitFile,
    ExtentPage,
    GetExtents,
    GrantBlocks,
    Invalidation,
    Opcode,
    PutKeyValue,
)
from metadata_server.extents import HOLE
from metadata_server.ops import get_extents
from tests.metadata.name_space import BLOCK_SIZE_BYTES, NameSpace


def grant(space: NameSpace, block_count: int) -> Run:
    request = GrantBlocks(ANY_TIER, "", "host", block_count, block_count)
    (run,) = space.do(Opcode.GRANT_BLOCKS, request).runs
    assert isinstance(run, Run)
    return run


def extent(
    file_block: int,
    run: Run,
    *,
    skip: int = 0,
    block_count: int | None = None,
    tail_bytes: int = BLOCK_SIZE_BYTES,
    visible_bytes: int | None = None,
) -> Extent:
    """Blocks of ``run`` from ``skip`` on, whose checksums say which they are."""
    block_count = run.block_count - skip if block_count is None else block_count
    place = Location(run.region, run.block + skip, run.generation)
    checksums = b"".join(
        (place.block + number).to_bytes(8, "little") for number in range(block_count)
    )
    visible_bytes = tail_bytes if visible_bytes is None else visible_bytes
    return Extent(file_block, block_count, tail_bytes, visible_bytes, (place,), checksums)


def commit(
    space: NameSpace,
    ino: int,
    extents: Sequence[Extent],
    *,
    size: int | None = None,
    bases: Sequence[tuple[int, Location]] = (),
    unused: Sequence[Run] = (),
) -> Attributes:
    if size is None:
        last = extents[-1]
        size = (last.file_block + last.block_count - 1) * BLOCK_SIZE_BYTES
        size += last.tail_visible_bytes
    request = CommitFile(
        ino,
        tuple(extents),
        tuple(
            BaseBlock(file_block, place.generation, place.region, place.block)
            for file_block, place in bases
        ),
        size,
        space.clock(),
        tuple(unused),
    )
    node: Attributes = space.do(Opcode.COMMIT_FILE, request)
    return node


def start_of(run: Run) -> Location:
    return Location(run.region, run.block, run.generation)


def page(space: NameSpace, ino: int, first_block: int = 0, block_count: int = 1 << 40) -> Any:
    reply: ExtentPage = space.do(Opcode.GET_EXTENTS, GetExtents(ino, first_block, block_count))
    return reply


def block_map(space: NameSpace, ino: int) -> dict[int, int]:
    """Block of the file -> block of the region that holds it, as the checksums say too."""
    found = {}
    for part in page(space, ino).extents:
        for number in range(part.block_count):
            place = part.replicas[0].block + number
            assert part.checksums[8 * number : 8 * number + 8] == place.to_bytes(8, "little")
            found[part.file_block + number] = place
    return found


@pytest.fixture
def ino(space: NameSpace) -> int:
    space.add_storage(1_000)
    return space.create(b"file").ino


def test_a_commit_shows_blocks_size_and_times(space: NameSpace, ino: int) -> None:
    before = space.attributes(ino)
    run = grant(space, 3)
    node = commit(space, ino, [extent(0, run, tail_bytes=100)])
    assert (node.size, node.block_count) == (2 * BLOCK_SIZE_BYTES + 100, 3)
    assert node.data_version != before.data_version
    assert node.ctime_ns > before.ctime_ns and node.mtime_ns > before.mtime_ns
    assert Invalidation(ino, b"", False) in space.outcome.invalidations
    assert ino in space.outcome.shown
    reply = page(space, ino)
    assert reply.attributes == node and len(reply.extents) == 1
    assert reply.extents[0].replicas == (Location(run.region, run.block, run.generation),)


def test_blocks_can_be_committed_once(space: NameSpace, ino: int) -> None:
    run = grant(space, 3)
    commit(space, ino, [extent(0, run)])
    with pytest.raises(FencedError):
        commit(space, ino, [extent(5, run)])
    with pytest.raises(FencedError):
        commit(space, space.create(b"other").ino, [extent(0, run)])


def test_adjacent_extents_become_one_up_to_the_limit(space: NameSpace, ino: int) -> None:
    run = grant(space, EXTENT_BLOCKS_MAX + 10)
    for number in range(run.block_count):
        commit(space, ino, [extent(number, run, skip=number, block_count=1)])
    counts = [part.block_count for part in page(space, ino).extents]
    assert counts == [EXTENT_BLOCKS_MAX, 10]
    assert len(block_map(space, ino)) == run.block_count


def test_a_gap_that_is_filled_joins_both_sides(space: NameSpace, ino: int) -> None:
    run = grant(space, 9)
    commit(space, ino, [extent(0, run, block_count=3), extent(6, run, skip=6, block_count=3)])
    assert len(page(space, ino).extents) == 2
    commit(space, ino, [extent(3, run, skip=3, block_count=3)])
    (whole,) = page(space, ino).extents
    assert whole.block_count == 9


def test_a_partly_filled_block_is_not_joined(space: NameSpace, ino: int) -> None:
    run = grant(space, 2)
    commit(space, ino, [extent(0, run, block_count=1, tail_bytes=10), extent(1, run, skip=1)])
    assert [part.block_count for part in page(space, ino).extents] == [1, 1]


def test_replaced_blocks_are_free_again(space: NameSpace, ino: int) -> None:
    commit(space, ino, [extent(0, grant(space, 10))])
    free_blocks = space.free_blocks
    node = commit(space, ino, [extent(3, grant(space, 4))])
    assert (node.block_count, node.size) == (10, 10 * BLOCK_SIZE_BYTES)
    assert space.free_blocks == free_blocks
    assert [part.file_block for part in page(space, ino).extents] == [0, 3, 7]


def test_replaced_blocks_wait_while_others_may_read_them(space: NameSpace, ino: int) -> None:
    commit(space, ino, [extent(0, grant(space, 10))])
    free_blocks = space.free_blocks
    space.driver.holders = lambda ino, asking: frozenset({99})
    commit(space, ino, [extent(0, grant(space, 10))])
    assert space.free_blocks == free_blocks - 10


def test_unused_blocks_go_back_with_the_commit(space: NameSpace, ino: int) -> None:
    run = grant(space, 10)
    free_blocks = space.free_blocks
    unused = Run(run.region, run.block + 4, 6, run.generation)
    commit(space, ino, [extent(0, run, block_count=4)], unused=[unused])
    assert space.free_blocks == free_blocks + 6


def test_a_changed_base_is_a_conflict_and_changes_nothing(space: NameSpace, ino: int) -> None:
    first, second = grant(space, 2), grant(space, 2)
    commit(space, ino, [extent(0, first)], bases=[(0, HOLE), (1, HOLE)])
    before = space.attributes(ino)
    with pytest.raises(ConflictError):
        commit(space, ino, [extent(0, second)], bases=[(0, start_of(first)), (1, HOLE)])
    assert space.attributes(ino) == before
    assert block_map(space, ino) == {0: first.block, 1: first.block + 1}
    commit(space, ino, [extent(0, second)], bases=[(0, start_of(first))])
    assert block_map(space, ino) == {0: second.block, 1: second.block + 1}


def test_two_versions_from_one_grant_are_told_apart(space: NameSpace, ino: int) -> None:
    run = grant(space, 3)
    commit(space, ino, [extent(0, run, block_count=1)])
    base = start_of(run)
    commit(space, ino, [extent(0, run, skip=1, block_count=1)], bases=[(0, base)])
    with pytest.raises(ConflictError):
        commit(space, ino, [extent(0, run, skip=2, block_count=1)], bases=[(0, base)])


def test_truncated_bytes_do_not_come_back_by_a_commit_that_built_on_them(
    space: NameSpace, ino: int
) -> None:
    first, second = grant(space, 1), grant(space, 1)
    commit(space, ino, [extent(0, first)])
    space.set(ino, size=100)
    with pytest.raises(ConflictError):
        commit(space, ino, [extent(0, second)], bases=[(0, start_of(first))])
    (cut,) = page(space, ino).extents
    assert cut.tail_visible_bytes == 100
    commit(space, ino, [extent(0, second)], bases=[(0, cut.replicas[0])])


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE_BYTES, 3 * BLOCK_SIZE_BYTES + 5])
def test_truncate_frees_whole_blocks_and_hides_the_rest(
    space: NameSpace, ino: int, size: int
) -> None:
    commit(space, ino, [extent(0, grant(space, 3)), extent(3, grant(space, 5))])
    node = space.set(ino, size=size)
    kept = -(-size // BLOCK_SIZE_BYTES)
    assert (node.size, node.block_count) == (size, kept)
    assert set(block_map(space, ino)) == set(range(kept))
    if size % BLOCK_SIZE_BYTES:
        assert page(space, ino).extents[-1].tail_visible_bytes == size % BLOCK_SIZE_BYTES
    assert space.set(ino, size=8 * BLOCK_SIZE_BYTES).block_count == kept
    if size % BLOCK_SIZE_BYTES:
        assert page(space, ino).extents[-1].tail_visible_bytes == size % BLOCK_SIZE_BYTES


def bad_extents(run: Run) -> list[Sequence[Extent]]:
    whole = extent(0, run)

    def changed(**fields: Any) -> list[Extent]:
        values = {name: getattr(whole, name) for name in whole.__struct_fields__}
        return [Extent(**{**values, **fields})]

    return [
        changed(file_block=-1),
        changed(block_count=0, checksums=b""),
        changed(block_count=-1),
        changed(block_count=EXTENT_BLOCKS_MAX + 1, checksums=bytes(8 * (EXTENT_BLOCKS_MAX + 1))),
        changed(tail_stored_bytes=BLOCK_SIZE_BYTES + 1),
        changed(tail_stored_bytes=0, tail_visible_bytes=0),
        changed(tail_stored_bytes=10),
        changed(tail_visible_bytes=-1),
        changed(checksums=whole.checksums[:-1]),
        changed(replicas=()),
        changed(replicas=whole.replicas * 2),
        [extent(1, run, block_count=1), extent(0, run, skip=1, block_count=1)],
        [extent(0, run, block_count=2), extent(1, run, skip=2, block_count=1)],
    ]


@pytest.mark.parametrize("number", range(len(bad_extents(Run(1, 0, 4, 1)))))
def test_malformed_extents_are_refused_whole(space: NameSpace, ino: int, number: int) -> None:
    bad = bad_extents(grant(space, 4))[number]
    before = space.attributes(ino)
    with pytest.raises(InvalidError):
        commit(space, ino, bad, size=4 * BLOCK_SIZE_BYTES)
    assert space.attributes(ino) == before


@pytest.mark.parametrize(
    ("region", "block", "generation"),
    [(1, 0, 0), (0, 4, 0), (0, 0, 1), (-9, 0, 0), (0, 1 << 70, 0)],
)
def test_blocks_that_are_not_this_clients_are_refused(
    space: NameSpace, ino: int, region: int, block: int, generation: int
) -> None:
    run = grant(space, 4)
    other = Run(run.region + region, run.block + block, 1, run.generation + generation)
    with pytest.raises(FencedError):
        commit(space, ino, [extent(0, run), _moved(extent(4, run, block_count=1), other)])
    commit(space, ino, [extent(0, run)])


def _moved(part: Extent, run: Run) -> Extent:
    place = Location(run.region, run.block, run.generation)
    return Extent(part.file_block, 1, part.tail_stored_bytes, part.tail_visible_bytes, (place,),
                  part.checksums)  # fmt: skip


def test_nothing_is_visible_beyond_the_size(space: NameSpace, ino: int) -> None:
    with pytest.raises(InvalidError):
        commit(space, ino, [extent(0, grant(space, 2))], size=BLOCK_SIZE_BYTES)


def test_sizes_have_a_limit(space: NameSpace, ino: int) -> None:
    with pytest.raises(TooLargeError):
        commit(space, ino, [], size=FILE_SIZE_MAX_BYTES + 1)
    assert commit(space, ino, [], size=FILE_SIZE_MAX_BYTES).size == FILE_SIZE_MAX_BYTES


def test_only_files_have_content(space: NameSpace, ino: int) -> None:
    directory = space.mkdir(b"d")
    with pytest.raises(InvalidError):
        commit(space, directory, [], size=0)
    with pytest.raises(InvalidError):
        page(space, directory)
    with pytest.raises(InvalidError):
        page(space, ino, -1)


def test_a_commit_to_a_removed_file_is_stale_and_keeps_the_grant(
    space: NameSpace, ino: int
) -> None:
    run = grant(space, 2)
    space.remove(b"file", not_open=ino)
    with pytest.raises(StaleError):
        commit(space, ino, [extent(0, run)])
    commit(space, space.create(b"other").ino, [extent(0, run)])


def test_a_long_map_comes_in_pages(
    space: NameSpace, ino: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_extents, "EXTENT_PAGE_MAX", 8)
    run = grant(space, 30)
    # Backwards, so that no two continue each other.
    commit(space, ino, [extent(n, run, skip=29 - n, block_count=1) for n in range(30)])
    found: list[int] = []
    first_block = 0
    while first_block < 30:
        reply = page(space, ino, first_block, 30 - first_block)
        assert len(reply.extents) <= 8
        found += [part.file_block for part in reply.extents]
        first_block = reply.next_block
    assert found == list(range(30))
    assert [part.file_block for part in page(space, ino, 10, 5).extents] == [10, 11, 12, 13, 14]


def put(
    space: NameSpace, table: int, key: bytes, extents: Sequence[Extent], size: int
) -> Attributes:
    node: Attributes = space.do(
        Opcode.PUT_KEY_VALUE, PutKeyValue(table, key, 0o644, 1, 2, size, tuple(extents))
    )
    return node


def test_a_key_value_is_made_and_replaced_as_a_whole(space: NameSpace) -> None:
    space.add_storage(100)
    table = space.mkdir(b"t", kind=NodeKind.TABLE)
    first = put(space, table, b"k", [extent(0, grant(space, 3), tail_bytes=7)], 10_000)
    assert (first.kind, first.size, first.block_count) == (NodeKind.KEYVALUE, 10_000, 3)
    free_blocks = space.free_blocks
    second = put(space, table, b"k", [extent(0, grant(space, 1), tail_bytes=5)], 5)
    assert (second.ino, second.size, second.block_count) == (first.ino, 5, 1)
    assert second.data_version != first.data_version
    assert space.free_blocks == free_blocks + 2
    assert space.names(table) == [b"k"]
    assert put(space, table, b"empty", [], 0).size == 0


def test_key_values_are_put_into_tables_only(space: NameSpace) -> None:
    with pytest.raises(NotPermittedError):
        put(space, ROOT_INODE, b"k", [], 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_commits_and_truncates_keep_the_map(space: NameSpace, seed: int) -> None:
    """Against a dictionary of what each block of the file should be; audited at the end."""
    choose = random.Random(seed)
    space.add_storage(400)
    ino = space.create(b"f").ino
    expected: dict[int, int] = {}
    size = 0
    for _ in range(150):
        if choose.random() < 0.2:
            size = choose.randrange(60 * BLOCK_SIZE_BYTES)
            space.set(ino, size=size)
            end = -(-size // BLOCK_SIZE_BYTES)
            expected = {block: place for block, place in expected.items() if block < end}
        else:
            new, file_block = [], choose.randrange(40)
            for _ in range(choose.randrange(1, 4)):
                run = grant(space, choose.randrange(1, 9))
                new.append(extent(file_block, run))
                expected |= {file_block + n: run.block + n for n in range(run.block_count)}
                file_block += run.block_count + choose.randrange(3)
            last = new[-1]
            end_bytes = (last.file_block + last.block_count) * BLOCK_SIZE_BYTES
            size = max(size, end_bytes)
            commit(space, ino, new)
        assert block_map(space, ino) == expected, f"seed {seed}"
        node = space.attributes(ino)
        assert (node.size, node.block_count) == (size, len(expected)), f"seed {seed}"
    space.assert_sound()


def test_an_error_in_mid_commit_leaves_no_trace(space: NameSpace, ino: int) -> None:
    good, bad = grant(space, 3), Run(1, 900, 1, 77)
    free_blocks = space.free_blocks
    with pytest.raises(CrailError):
        commit(space, ino, [extent(0, good), extent(3, bad)])
    assert block_map(space, ino) == {}
    assert space.free_blocks == free_blocks
