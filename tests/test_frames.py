"""What is a target and what is context, in each frame."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona import frames
from persona.domain import Line, Message, Role
from persona.engine.scripted import ScriptedText
from persona.frames import Framed

TEXT = ScriptedText()
SYSTEM = Message(Role.SYSTEM, "Be kind.")
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def target(framed: Framed) -> list[int]:
    return [framed.tokens[position] for position in framed.targets]


def user(text: str) -> Message:
    return Message(Role.USER, text)


def assistant(text: str) -> Message:
    return Message(Role.ASSISTANT, text)


def test_a_turn_has_the_words_and_their_end_as_target() -> None:
    framed = frames.turn([SYSTEM, assistant("Well?")], "no idea", tokenizer=TEXT)
    assert target(framed) == [*TEXT.encode("no idea"), TEXT.END]
    assert framed.tokens == TEXT.render([SYSTEM, assistant("Well?"), user("no idea")], reply=False).tokens


def test_a_turn_after_words_of_the_same_role_is_merged_to_them_and_they_are_context() -> None:
    framed = frames.turn([SYSTEM, user("first")], "second", tokenizer=TEXT)
    assert framed.tokens == TEXT.render([SYSTEM, user("first\n\nsecond")], reply=False).tokens
    assert target(framed) == [*TEXT.encode("second"), TEXT.END]


def test_a_first_turn_without_context_has_no_target_at_position_zero() -> None:
    framed = frames.turn([], "hi", tokenizer=TEXT)
    assert framed.targets[0] >= 1
    assert target(framed) == [*TEXT.encode("hi"), TEXT.END]


def test_a_draft_puts_the_users_words_into_the_assistants_role() -> None:
    framed = frames.draft([Line("bob", "where?"), Line("eve", "there")], "no, here", tokenizer=TEXT)
    expected = [Message(Role.SYSTEM, frames.DRAFT_SYSTEM), user("bob: where?\neve: there"), assistant("no, here")]
    assert framed.tokens == TEXT.render(expected, reply=False).tokens
    assert target(framed) == [*TEXT.encode("no, here"), TEXT.END]


def test_a_draft_without_context_still_has_somebody_who_asks() -> None:
    framed = frames.draft([], "hi", tokenizer=TEXT)
    assert TEXT.decode(framed.tokens).startswith(frames.DRAFT_SYSTEM + frames.DRAFT_OPENING)


def test_a_reply_has_the_assistants_words_as_target() -> None:
    framed = frames.reply([SYSTEM, user("2+2?")], "4", tokenizer=TEXT)
    assert target(framed) == [*TEXT.encode("4"), TEXT.END]
    assert framed.tokens == TEXT.render([SYSTEM, user("2+2?"), assistant("4")], reply=False).tokens


def test_imported_context_is_one_assistant_message_of_lines() -> None:
    assert frames.heard([Line("bob", "where?"), Line("eve", "there")]) == [assistant("bob: where?\neve: there")]
    assert frames.heard([]) == []


def test_a_conversation_becomes_lines_without_its_system_text() -> None:
    assert frames.lines([SYSTEM, user("a"), assistant("b")]) == [Line(frames.OWN, "a"), Line("assistant", "b")]


@given(st.lists(WORDS, max_size=3), WORDS)
def test_only_the_own_words_are_targets_whatever_they_are(context: list[str], text: str) -> None:
    heard = [assistant(part) for part in context]
    assert TEXT.decode(target(frames.turn(heard, text, tokenizer=TEXT))[:-1]) == text
    assert TEXT.decode(target(frames.turn([user(part) for part in context][:1], text, tokenizer=TEXT))[:-1]) == text
    assert TEXT.decode(target(frames.draft([Line("x", part) for part in context], text, tokenizer=TEXT))[:-1]) == text


class Joining(ScriptedText):
    """Joins a line break with the letter behind it into one token, as a trained tokenizer may."""

    def encode(self, text: str) -> list[int]:
        plain = super().encode(text)
        joined: list[int] = []
        for token in plain:
            if joined and joined[-1] == 10 and token != 10:
                joined[-1] = 1000 + token
            else:
                joined.append(token)
        return joined


def test_a_token_across_the_border_belongs_to_the_target() -> None:
    tokenizer = Joining()
    framed = frames.turn([user("first")], "second", tokenizer=tokenizer)
    assert target(framed) == [1000 + ord("s"), *TEXT.encode("econd"), TEXT.END]


@pytest.mark.parametrize(("targets", "tokens", "kept"), [(99, 99, 4), (2, 99, 2), (0, 99, 0), (99, 8, 2), (99, 3, 0)])
def test_clipping_bounds_targets_and_length(targets: int, tokens: int, kept: int) -> None:
    framed = frames.turn([assistant("Hm?")], "abc", tokenizer=TEXT)  # mark, 4, mark, 4
    clipped = framed.clipped(targets=targets, tokens=tokens)
    assert clipped.targets == framed.targets[:kept]
    assert clipped.tokens == (framed.tokens[: framed.targets[kept - 1] + 1] if kept else [])


def texts(messages: Sequence[Message | Line]) -> list[str]:
    return [message.text for message in messages]


@pytest.mark.parametrize(
    ("limit", "left"),
    [(100, ["aaaa", "bbbb", "cc"]), (10, ["aaaa", "bbbb", "cc"]), (9, ["aaa", "bbbb", "cc"]), (6, ["bbbb", "cc"]),
     (3, ["b", "cc"]), (2, ["cc"]), (1, ["c"]), (0, [])],
)  # fmt: skip
def test_trimming_keeps_the_newest_words(limit: int, left: list[str]) -> None:
    context = [user("aaaa"), assistant("bbbb"), user("cc")]
    assert texts(frames.trim(context, limit, TEXT)) == left
    assert texts(frames.trim_lines([Line("x", message.text) for message in context], limit, TEXT)) == left
    assert [m.role for m in frames.trim(context, limit, TEXT)] == [m.role for m in context][len(context) - len(left) :]


@given(st.lists(WORDS, max_size=5), st.integers(0, 80))
def test_trimmed_context_fits_and_is_never_broken(parts: list[str], limit: int) -> None:
    kept = texts(frames.trim([user(part) for part in parts], limit, TEXT))
    assert sum(len(TEXT.encode(part)) for part in kept) <= limit
    assert "".join(parts).endswith("".join(kept)) or "\ufffd" in "".join(parts)
