"""Histories of people who exist only in tests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from persona.domain import Entry, EntryId, Line, Origin, Role, UserId
from persona.engine.scripted import ScriptedText
from persona.settings import Learning

TEXT = ScriptedText()
DAWN = datetime(2026, 3, 1, tzinfo=UTC)

# Little is enough: 3 messages with 30 tokens judge, 10 tokens train.
SMALL = Learning.model_validate({"held_out_messages": 3, "held_out_tokens": 30, "min_aged_tokens": 20})


def learning(**changes: Any) -> Learning:
    return Learning.model_validate({**SMALL.model_dump(), **changes})


def entry(number: int, text: str, role: Role = Role.USER, origin: Origin = Origin.CHAT, **more: Any) -> Entry:
    ts = DAWN + timedelta(minutes=number)
    conversation = more.pop("conversation", f"c{number}")
    return Entry(EntryId(number), UserId(1), role, text, ts, origin, conversation, len(TEXT.encode(text)), **more)


def own(count: int, start: int = 1) -> list[Entry]:
    """So many different messages, each of its own conversation."""
    return [entry(number, f"I say {_word(number)} today") for number in range(start, start + count)]


def imported(number: int, text: str, context: Sequence[tuple[str, str]] = ()) -> Entry:
    lines = tuple(Line(author, said) for author, said in context)
    return entry(number, text, origin=Origin.IMPORT, context=lines)


def _word(number: int) -> str:
    """A word of its own for every number, without digits."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04}")
