"""Sizes of recorded steps and what fills them up, with plain integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.engine.buckets import BUCKETS, Layout, Row, Table, bucket, up_to

LAYOUT = Layout(size=16, stride=96, most=3, scratch=90)


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, None), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, None)],
)
def test_a_step_takes_the_smallest_size_that_holds_it(rows: int, size: int | None) -> None:
    assert bucket(rows) == size


@pytest.mark.parametrize(("position", "slot"), [(0, 7 * 96), (15, 7 * 96 + 15), (16, 3 * 96), (40, 5 * 96 + 8)])
def test_a_line_says_where_the_token_goes_and_what_it_sees(position: int, slot: int) -> None:
    (line,) = filled([Row(11, position, (7, 3, 5))])
    assert line == [11, position, slot, position + 1, 7, 3, 5]


def test_fewer_pages_than_there_is_room_for_are_filled_up_with_the_scratch_page() -> None:
    assert filled([Row(11, 20, (7, 3))]) == [[11, 20, 3 * 96 + 4, 21, 7, 3, 90]]


def test_of_more_pages_than_there_is_room_for_the_first_stand_there() -> None:
    assert filled([Row(11, 20, (7, 3, 5, 8))]) == [[11, 20, 3 * 96 + 4, 21, 7, 3, 5]]


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_spare_rows_touch_the_scratch_page_only(rows: int) -> None:
    size = bucket(rows) or 4
    lines = filled([Row(11, 20, (row, row + 30)) for row in range(rows)], size)
    assert len(lines) == size
    assert all(len(line) == LAYOUT.width for line in lines)
    for token, position, slot, length, *pages in lines[rows:]:
        assert (token, position, length) == (0, 0, 1)
        assert slot // 96 == 90
        assert set(pages) == {90}
    for _, _, slot, length, *pages in lines[:rows]:
        assert slot // 96 != 90
        assert 90 not in pages[: -(-length // 16)]


PAGES = [(1,), (2, 3), (4, 5, 6), (7, 8, 9)]  # of four sequences
STEPS = st.lists(st.lists(st.tuples(st.sampled_from(PAGES), st.integers(0, 15)), max_size=4), max_size=8)


@given(STEPS)
def test_a_table_that_was_used_says_what_a_new_one_says(steps: list[list[tuple[tuple[int, ...], int]]]) -> None:
    """Whoever came and left before: no page of an earlier row stays."""
    used = Table(LAYOUT, 4)
    for step in steps:
        rows = [Row(11, position, pages) for pages, position in step]
        assert used.filled(rows).tolist() == filled(rows, 4)


def filled(rows: list[Row], size: int = 1) -> list[list[int]]:
    lines: list[list[int]] = Table(LAYOUT, size).filled(rows).tolist()
    return lines


def test_longer_sequences_than_a_recording_has_room_for_do_not_fit() -> None:
    assert LAYOUT.fits([Row(1, 47, [1, 2, 3])])
    assert not LAYOUT.fits([Row(1, 0, [1]), Row(1, 48, [1, 2, 3, 4])])


def test_sizes_grow() -> None:
    assert sorted(set(BUCKETS)) == list(BUCKETS)


def test_only_sizes_that_a_step_may_have_are_recorded() -> None:
    assert [up_to(rows) for rows in (1, 3, 4, 33)] == [(1,), (1, 2, 4), (1, 2, 4), BUCKETS]
    assert up_to(10 * BUCKETS[-1]) == BUCKETS
    assert all(bucket(row) in up_to(rows) for rows in range(1, BUCKETS[-1] + 1) for row in range(1, rows + 1))
