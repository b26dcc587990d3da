"""``BlockMap`` against one entry for each block."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from crailfs.client.block_map import BlockMap, cut, joined
from crailfs.limits import EXTENT_BLOCKS_MAX
from crailfs.records import Extent, Location

BLOCK = 4096


def extent(file_block: int, block_count: int, generation: int, tail: int = BLOCK) -> Extent:
    checksums = b"".join(
        (generation << 32 | index).to_bytes(8, "little") for index in range(block_count)
    )
    place = Location(7, generation * 1000, generation)
    return Extent(file_block, block_count, tail, tail, (place,), checksums)


def as_blocks(blocks: BlockMap, end: int) -> dict[int, tuple[int, int, int, int]]:
    """Region block, generation, checksum, visible bytes of each block that is there."""
    found = {}
    for block in range(end):
        held = blocks.at(block)
        if held is not None:
            index = block - held.file_block
            last = index == held.block_count - 1
            found[block] = (
                held.replicas[0].block + index,
                held.replicas[0].generation,
                int.from_bytes(held.checksums[index * 8 : index * 8 + 8], "little"),
                held.tail_visible_bytes if last else BLOCK,
            )
    return found


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 8), st.sampled_from((1, 100, BLOCK))),
        max_size=12,
    )
)
def test_later_extents_lie_over_earlier_ones(puts: list[tuple[int, int, int]]) -> None:
    blocks = BlockMap.empty_file(BLOCK)
    model: dict[int, tuple[int, int, int, int]] = {}
    for generation, (file_block, block_count, tail) in enumerate(puts, start=1):
        blocks.put(extent(file_block, block_count, generation, tail))
        for index in range(block_count):
            model[file_block + index] = (
                generation * 1000 + index,
                generation,
                generation << 32 | index,
                tail if index == block_count - 1 else BLOCK,
            )
    assert as_blocks(blocks, 40) == model
    touched = blocks.overlapping(5, 15)
    covered = {b for e in touched for b in range(e.file_block, e.file_block + e.block_count)}
    assert covered & set(range(5, 15)) == set(model) & set(range(5, 15))


def test_a_truncated_tail_is_asked_for_again() -> None:
    blocks = BlockMap.empty_file(BLOCK)
    blocks.put(extent(0, 4, 1))
    blocks.put(extent(4, 2, 2))
    blocks.truncate(2 * BLOCK + 10)
    assert blocks.first_unknown(0, 100) == (0, 3), "its generation changed: only the server knows"
    assert blocks.knows(3, 1 << 40)
    assert blocks.overlapping(3, 1 << 40) == []


def test_truncating_between_blocks_keeps_what_is_known() -> None:
    blocks = BlockMap.empty_file(BLOCK)
    blocks.put(extent(0, 4, 1))
    blocks.truncate(2 * BLOCK)
    assert blocks.first_unknown(0, 100) is None
    assert sorted(as_blocks(blocks, 100)) == [0, 1]


def test_extending_changes_nothing() -> None:
    blocks = BlockMap.empty_file(BLOCK)
    blocks.put(extent(0, 2, 1, tail=50))
    blocks.truncate(1 << 30)
    assert blocks.first_unknown(0, 1 << 20) is None
    assert as_blocks(blocks, 3)[1][3] == 50


def test_only_learned_ranges_are_known() -> None:
    blocks = BlockMap(BLOCK)
    assert blocks.first_unknown(3, 9) == (3, 9)
    blocks.learn(4, 6, [extent(5, 1, 1)])
    assert blocks.first_unknown(3, 9) == (3, 4)
    assert blocks.first_unknown(4, 9) == (6, 9)
    assert blocks.knows(4, 6)


@given(st.data())
def test_what_is_joined_is_what_was_cut(data: st.DataObject) -> None:
    """Some places are neighbours by accident: runs of whole blocks of one region."""
    whole = [
        Extent(begin, 8, tail, tail, (Location(region, place, 3),), bytes(range(begin, begin + 64)))
        for begin, tail, region, place in (
            (0, BLOCK, 1, 100), (8, BLOCK, 1, 108), (16, 9, 1, 116), (24, BLOCK, 1, 124),
            (40, BLOCK, 1, 132), (48, BLOCK, 2, 140), (56, BLOCK, 2, 150),
        )
    ]  # fmt: skip
    cuts = sorted(data.draw(st.sets(st.integers(0, 64), max_size=12)) | {0, 64})
    parts = [
        cut(extent, begin, end, BLOCK)
        for begin, end in itertools.pairwise(cuts)
        for extent in whole
        if extent.file_block < end and begin < extent.file_block + extent.block_count
    ]
    found = joined(parts, 0, 64, BLOCK)
    assert [(each.file_block, each.block_count) for each in found] == [
        (0, 24), (24, 8), (40, 8), (48, 8), (56, 8)
    ]  # fmt: skip
    assert [each.tail_visible_bytes for each in found] == [9, BLOCK, BLOCK, BLOCK, BLOCK]
    assert b"".join(each.checksums for each in found) == b"".join(
        extent.checksums for extent in whole
    )


def test_no_more_is_joined_than_one_extent_may_have() -> None:
    def part(file_block: int, block_count: int) -> Extent:
        place = Location(1, file_block, 3)
        return Extent(file_block, block_count, BLOCK, BLOCK, (place,), bytes(8 * block_count))

    parts = [part(0, 28), part(28, EXTENT_BLOCKS_MAX), part(156, EXTENT_BLOCKS_MAX)]

    def block_counts(first_block: int, end_block: int) -> list[int]:
        touched = [
            each
            for each in parts
            if each.file_block < end_block and first_block < each.file_block + each.block_count
        ]
        return [each.block_count for each in joined(touched, first_block, end_block, BLOCK)]

    assert block_counts(0, 284) == [28, 128, 128]
    assert block_counts(0, 128) == [28 + 128], "128 blocks of them are wanted"
    assert block_counts(100, 228) == [128 + 128]
    assert block_counts(100, 229) == [128, 128]
