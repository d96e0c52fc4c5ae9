"""Forests: what sequences share is one node, and nothing else is lost or mixed up."""

from hypothesis import given
from hypothesis import strategies as st

from persona.engine.forest import ROOT, Forest, packed

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), max_size=12)


def walk(forest: Forest, node: int) -> list[int]:
    """The tokens from the beginning to `node`."""
    found = []
    while node != ROOT:
        found.append(forest.tokens[node])
        node = forest.parents[node]
    return found[::-1]


@given(sequences)
def test_every_node_of_a_path_stands_after_its_whole_beginning(some: list[list[int]]) -> None:
    forest = Forest()
    for sequence in some:
        expected = forest.missing(sequence)
        before = len(forest)
        path = forest.add(sequence)
        assert len(forest) - before == expected
        assert [walk(forest, node) for node in path] == [sequence[: i + 1] for i in range(len(sequence))]
        assert [forest.positions[node] for node in path] == list(range(len(sequence)))


@given(sequences)
def test_equal_beginnings_are_one_node(some: list[list[int]]) -> None:
    forest = Forest()
    for sequence in some:
        forest.add(sequence)
    beginnings = {tuple(sequence[: i + 1]) for sequence in some for i in range(len(sequence))}
    assert len(forest) == len(beginnings)


@given(sequences, st.integers(1, 40))
def test_in_any_chunks_a_node_sees_itself_and_what_stands_before_it(some: list[list[int]], size: int) -> None:
    forest = Forest()
    for sequence in some:
        forest.add(sequence)
    sight: list[int] = []  # nodes by their column
    done = 0
    for chunk in forest.chunks(size):
        assert (chunk.start, len(chunk) <= size) == (done, True)
        sight += range(done, done + len(chunk))
        assert chunk.seen.shape == (len(chunk), len(sight))
        for row in range(len(chunk)):
            seen = [sight[column] for column in chunk.seen[row].nonzero()[0]]
            assert [forest.tokens[node] for node in seen] == walk(forest, done + row)
            assert seen[-1] == done + row
        sight, done = [sight[column] for column in chunk.keep], done + len(chunk)
    assert (done, sight) == (len(forest), [])


@given(sequences, st.integers(1, 5))
def test_in_sorted_order_one_sequence_at_most_stays_in_sight(some: list[list[int]], size: int) -> None:
    forest = Forest()
    for sequence in sorted(some):
        forest.add(sequence)
    assert all(len(chunk.keep) <= max(map(len, some)) for chunk in forest.chunks(size))


@given(sequences, st.integers(1, 30))
def test_packs_hold_at_most_their_size_and_every_sequence_once(some: list[list[int]], size: int) -> None:
    made = list(packed(some, size))
    assert [index for _, members in made for index, _ in members] == list(range(len(some)))
    for forest, members in made:
        assert len(forest) <= size or len(members) == 1
        assert all(walk(forest, path[-1]) == some[index] for index, path in members)
