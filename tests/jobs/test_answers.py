"""Questions with known answers: fair ones, asked once each, and matched by whole words."""

import re

import pytest

from jobs import answers
from jobs.answers import Question
from persona.engine.protocol import AdapterRef, GenerateRequest
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.settings import Settings

TEXT = ScriptedText()


def test_there_are_a_hundred_and_none_gives_its_answer_away() -> None:
    some = answers.questions()
    assert len(some) == len({question.ask.casefold() for question in some}) == 100
    for question in some:
        assert question.accept
        assert not question.answered(question.ask)


@pytest.mark.parametrize(
    ("accept", "reply", "right"),
    [
        ("8", "It has 8 legs.", True), ("8", "It has 18 legs.", False), ("eight", "Eight!", True),
        ("eight", "eighteen", False), ("Paris", "**paris**, of course", True), ("Paris", "Parisian", False),
        ("H2O", "H2O.", True), ("Buenos Aires", "it is buenos aires", True), ("O", "(O)", True), ("O", "Ο", False),
        ("yen", "", False), ("é", "café", False),
    ],
)  # fmt: skip
def test_a_reply_counts_when_an_accepted_word_stands_in_it_whole(accept: str, reply: str, right: bool) -> None:
    assert Question("?", ("never", accept)).answered(reply) is right


def _right(request: GenerateRequest) -> str:
    asked = TEXT.decode(request.tokens)
    found = next(question for question in answers.questions() if question.ask in asked)
    return f"I think it is {found.accept[-1]}."


async def test_each_question_is_asked_once_under_the_adapter() -> None:
    engine, ref = ScriptedEngine(_right), AdapterRef(1, 1, "nowhere", "0" * 64)
    engine._check = lambda adapter: None  # type: ignore[method-assign]
    found = await answers.answered(engine, TEXT, ref, Settings())
    assert found == [True] * 100
    asked = [TEXT.decode(request.tokens) for request in engine.requests]
    assert all(sum(question.ask in one for one in asked) >= 1 for question in answers.questions())
    assert len(asked) == 100
    assert {request.adapter for request in engine.requests} == {ref}
    assert {request.sampling.temperature for request in engine.requests} == {0.0}


async def test_wrong_and_half_right_engines_are_told_apart() -> None:
    assert not any(await answers.answered(ScriptedEngine("no idea"), TEXT, None, Settings()))
    half = ScriptedEngine(lambda request: "Paris" if re.search("France|Italy", TEXT.decode(request.tokens)) else "-")
    assert await answers.answered(half, TEXT, None, Settings(), limit=3) == [True, False, False]
