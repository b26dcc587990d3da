"""``BlockMap`` against one entry for each block."""

from hypothesis import given
from hypothesis import strategies as st

from crailfs.client.block_map import BlockMap
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
