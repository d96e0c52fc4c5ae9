"""Calls of tools in a reply: found across the borders of pieces, and nothing that was said is lost."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona import chat_tools
from persona.chat_tools import Call, Ear, Heard, Tool
from persona.domain import Role
from persona.errors import TooLarge

LAMP = '{"name": "turn_on", "arguments": {"lamp": "desk"}}'
CALL = f"<tool_call>\n{LAMP}\n</tool_call>"
TURN_ON = Call("turn_on", {"lamp": "desk"})
PARTS = ["<tool_call>", "</tool_call>", "<think>", "</think>", LAMP, "{", "<", "Hello ", "<tool_", "call>", "\n", "é"]
DEEP = '{"name": "a", "arguments": ' + '{"a": ' * 70 + "1" + "}" * 71
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=12).map("".join)


def heard(pieces: Sequence[str]) -> list[Heard]:
    """What each of the pieces and the end of the reply add."""
    ear = Ear()
    return [*(ear.hear(piece) for piece in pieces), ear.end()]


def whole(pieces: Sequence[str]) -> Heard:
    parts = heard(pieces)
    return Heard("".join(part.text for part in parts), tuple(call for part in parts for call in part.calls))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 12, 1000])
def test_a_call_is_found_whatever_the_borders_of_the_pieces(size: int) -> None:
    text = f"I will. {CALL} Done <b>."
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert whole(pieces) == Heard("I will.  Done <b>.", (TURN_ON,))


def test_text_before_a_call_goes_on_at_once() -> None:
    parts = heard(["Let me", " see <tool", "_call>", LAMP, "</tool_call>", " ok"])
    assert [part.text for part in parts] == ["Let me", " see ", "", "", "", " ok", ""]
    assert [bool(part.calls) for part in parts] == [False, False, False, False, True, False, False]


def test_several_calls_come_in_their_order() -> None:
    other = CALL.replace("desk", "hall")
    assert whole([CALL + "\n" + other]).calls == (TURN_ON, Call("turn_on", {"lamp": "hall"}))


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"name": ""}',
        '{"name": 1}',
        '{"name": "a", "arguments": [1]}',
        LAMP[:-1],
        DEEP,
        "[" * 9999,
    ],
    ids=lambda inner: inner[:20],
)
def test_what_is_no_readable_call_stays_text_to_the_letter(inner: str) -> None:
    text = f"So: <tool_call>{inner}</tool_call> and on"
    assert whole([text]) == Heard(text)
    assert whole(list(text)) == Heard(text)


@pytest.mark.parametrize("text", ["<tool_call>", "<tool_call>{", "a <tool_", "<", f"<tool_call>{LAMP[:-2]}"])
def test_a_reply_that_breaks_off_in_a_call_keeps_its_text(text: str) -> None:
    assert whole(list(text)) == Heard(text)


def test_a_call_that_only_lacks_its_closing_tag_is_one() -> None:
    assert whole([f"Yes <tool_call>\n{LAMP}"]) == Heard("Yes ", (TURN_ON,))


def test_a_broken_call_does_not_hide_the_next_one() -> None:
    assert whole([f"<tool_call>{{ {CALL}"]) == Heard("<tool_call>{ ", (TURN_ON,))


def test_a_call_in_a_thought_is_none() -> None:
    text = f"<think>maybe {CALL}</think>No."
    assert whole(list(text)) == Heard(text)
    assert whole([text + CALL]) == Heard(text, (TURN_ON,))


@pytest.mark.parametrize(
    "written",
    [
        '{"name": "f", "parameters": {"a": 1}}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"arguments": {"a": 1}, "name": "f", "id": 7}',
    ],
)
def test_what_models_make_of_the_form_is_understood(written: str) -> None:
    assert whole([f"<tool_call>{written}</tool_call>"]).calls == (Call("f", {"a": 1}),)


@pytest.mark.parametrize(
    "written", ['{"name": "f"}', '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": ""}']
)
def test_a_call_may_have_no_arguments(written: str) -> None:
    assert whole([f"<tool_call>{written}</tool_call>"]).calls == (Call("f", {}),)


@given(TEXTS, st.integers(1, 9))
def test_the_borders_of_the_pieces_make_no_difference(text: str, size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert whole(pieces) == whole([text])


@given(TEXTS)
def test_nothing_that_was_said_is_lost(text: str) -> None:
    said = whole([text])
    rest = iter(text)
    assert all(char in rest for char in said.text)  # in its order
    assert said.calls or said.text == text


def test_the_model_is_told_the_tools_and_reads_calls_as_it_writes_them() -> None:
    told = chat_tools.tell([Tool("turn_on", "Turns on a lamp.", {"type": "object"}), Tool("now")])
    assert told.role is Role.SYSTEM
    lines = told.text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [msgspec.json.decode(line)["function"]["name"] for line in lines] == ["turn_on", "now"]
    assert msgspec.json.decode(lines[1])["function"] == {"name": "now"}
    written = chat_tools.called([TURN_ON, TURN_ON])
    assert written.role is Role.CALL
    assert whole([written.text]).calls == (TURN_ON, TURN_ON)


def test_too_many_and_too_long_tools_are_refused() -> None:
    chat_tools.tell([Tool("f")] * chat_tools.MAX_TOOLS)
    for tools in ([Tool("f")] * (chat_tools.MAX_TOOLS + 1), [Tool("f", "x" * chat_tools.MAX_TOOL_BYTES)]):
        with pytest.raises(TooLarge) as refused:
            chat_tools.tell(tools)
        assert refused.value.param == "tools"
