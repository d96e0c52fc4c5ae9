"""Stop strings: wherever the tokens happen to break the text, the reply is the same."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona.engine.stops import Stops

letters = st.text("ab", max_size=24)
some_stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def reply(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watch = Stops(stops)
    shown = ""
    for piece in pieces:
        new, stopped = watch.feed(piece)
        shown += new
        if stopped:
            return shown, True
    return shown + watch.flush(), False


def split(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def model(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition: read letter by letter until the text ends with a stop string, and cut the longest such."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300)
@given(stops=some_stops, text=letters)
def test_a_reply_ends_before_the_first_stop_that_is_complete(stops: list[str], text: str) -> None:
    assert reply(stops, list(text)) == model(stops, text)


@settings(max_examples=300)
@example(stops=["abab", "b"], text="abab", cuts=[])
@given(stops=some_stops, text=letters, cuts=st.lists(st.integers(0, 24)))
def test_any_split_into_pieces_gives_the_same_reply(stops: list[str], text: str, cuts: list[int]) -> None:
    assert reply(stops, split(text, cuts)) == reply(stops, list(text))


def test_what_cannot_become_a_stop_is_shown_at_once() -> None:
    watch = Stops(["END"])
    assert watch.feed("some text") == ("some text", False)
    assert watch.feed(" E") == (" ", False)
    assert watch.feed("X") == ("EX", False)


def test_an_empty_stop_string_stops_nothing() -> None:
    assert reply([""], ["text"]) == ("text", False)
