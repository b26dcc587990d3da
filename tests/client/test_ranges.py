"""``RangeSet`` against a plain set of integers."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from crailfs.client.ranges import RangeSet

BOUNDS = st.tuples(st.integers(0, 40), st.integers(0, 40))


@given(st.lists(st.tuples(st.booleans(), BOUNDS), max_size=30), BOUNDS)
def test_same_as_a_set(changes: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    ranges, model = RangeSet(), set[int]()
    for is_added, (start, end) in changes:
        if is_added:
            ranges.add(start, end)
            model |= set(range(start, end))
        else:
            ranges.remove(start, end)
            model -= set(range(start, end))
    assert {value for start, end in ranges for value in range(start, end)} == model
    pairs = list(ranges)
    assert all(start < end for start, end in pairs)
    assert all(left[1] < right[0] for left, right in pairwise(pairs))

    wanted = range(*asked)
    assert ranges.covers(*asked) == (set(wanted) <= model)
    missing = [value for value in wanted if value not in model]
    gap = ranges.first_gap(*asked)
    if not missing:
        assert gap is None
    else:
        assert gap is not None
        assert gap[0] == missing[0]
        assert set(range(*gap)) <= set(missing)
        assert gap[1] == asked[1] or gap[1] in model
