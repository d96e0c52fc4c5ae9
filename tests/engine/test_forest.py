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


@given(sequences)
def test_a_node_sees_itself_and_what_stands_before_it_in_its_tree(some: list[list[int]]) -> None:
    forest = Forest()
    for sequence in some:
        forest.add(sequence)
    seen = forest.seen()
    for node in range(len(forest)):
        before = walk(forest, node)
        assert sorted(forest.positions[other] for other in seen[node].nonzero()[0]) == list(range(len(before)))
        assert all(
            walk(forest, int(other)) == before[: forest.positions[other] + 1] for other in seen[node].nonzero()[0]
        )


@given(sequences, st.integers(1, 30))
def test_packs_hold_at_most_their_size_and_every_sequence_once(some: list[list[int]], size: int) -> None:
    made = list(packed(some, size))
    assert [index for _, members in made for index, _ in members] == list(range(len(some)))
    for forest, members in made:
        assert len(forest) <= size or len(members) == 1
        assert all(walk(forest, path[-1]) == some[index] for index, path in members)
