"""The questions with known answers: what the file holds, what counts as right, and what the engine is asked."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from histories import TEXT

from jobs import answers
from jobs.answers import Question
from persona.engine.protocol import AdapterRef, Chunk, GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import AdapterError, EngineDown
from persona.settings import Settings

SETTINGS = Settings.model_validate({"home": "/nowhere"})
KNOWN = {question.ask: question.accept[0] for question in answers.questions()}


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRef:
    """A version whose file exists."""
    content = b"weights"
    (tmp_path / "adapter.safetensors").write_bytes(content)
    return AdapterRef(7, 3, str(tmp_path), hashlib.sha256(content).hexdigest())


def asked(request: GenerateRequest) -> str:
    """The question of a request: the user's turn, between token 257 and the end of turn."""
    start = request.tokens.index(257) + 1
    return TEXT.decode(request.tokens[start : request.tokens.index(TEXT.END, start)])


def knowing(request: GenerateRequest) -> str:
    return f"It is {KNOWN[asked(request)]}."


def test_there_are_a_hundred_different_questions() -> None:
    asks = [question.ask.casefold() for question in answers.questions()]
    assert len(asks) == len(set(asks)) == 100


@pytest.mark.parametrize("question", answers.questions(), ids=lambda question: question.ask)
def test_a_question_is_short_and_does_not_hold_its_answer(question: Question) -> None:
    assert len(question.ask) <= 80
    assert question.ask.endswith("?")
    assert not question.answered_by(question.ask)


@pytest.mark.parametrize("question", answers.questions(), ids=lambda question: question.ask)
def test_answers_are_single_words_and_each_is_accepted(question: Question) -> None:
    assert all(re.fullmatch(r"[^\W_]+(-[^\W_]+)?", answer) for answer in question.accept)
    assert len({answer.casefold() for answer in question.accept}) == len(question.accept)
    assert all(question.answered_by(f"I think it is {answer}, is it not?") for answer in question.accept)


def test_numbers_are_accepted_in_digits_and_in_words() -> None:
    for question in answers.questions():
        digits = [answer.isdigit() for answer in question.accept]
        assert not any(digits) or digits == [True, False], question.ask


def test_questions_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "QUESTIONS", tmp_path / "questions.json")
    for wrong in ('[{"ask": "Who?"}]', '[{"ask": "Who?", "accept": []}]', '[{"ask": "", "accept": ["I"]}]'):
        answers.QUESTIONS.write_text(wrong, encoding="utf-8")
        with pytest.raises(msgspec.ValidationError):
            answers.questions.__wrapped__()


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("8", True),
        ("Eight.", True),
        ("2 + 6 = 8, of course", True),
        ("**8**", True),
        ("The answer is eight\n", True),
        ("", False),
        ("18", False),
        ("80", False),
        ("eighteen", False),
        ("twenty-eight", False),
        ("eight-year-old", False),
        ("8.5", False),
        ("0.8", False),
        ("8,000", False),
        ("-8", False),
        ("weight", False),
        ("seven", False),
    ],
)
def test_a_number_is_right_as_a_whole(reply: str, right: bool) -> None:
    assert Question("2 plus 6?", ("8", "eight")).answered_by(reply) is right


@pytest.mark.parametrize(
    ("accept", "reply", "right"),
    [
        ("Paris", "PARIS!", True),
        ("Paris", "«paris», the city of light", True),
        ("Paris", "Parisians live there", False),
        ("café", "un cafe", True),
        ("cafe", "Un Cafe\N{COMBINING ACUTE ACCENT}, s'il vous plaît", True),
        ("H2O", "It is H₂O.", True),
        ("H2O", "It is CH2O.", False),
        ("twenty-five", "Twenty-five", True),
    ],
)
def test_case_accents_and_punctuation_do_not_matter(accept: str, reply: str, right: bool) -> None:
    assert Question("What?", (accept,)).answered_by(reply) is right


async def test_an_engine_that_knows_everything_is_right_everywhere() -> None:
    assert await answers.answered(ScriptedEngine(knowing), TEXT, None, SETTINGS) == [True] * 100


async def test_an_engine_that_knows_nothing_is_wrong_everywhere() -> None:
    assert await answers.answered(ScriptedEngine("I do not know."), TEXT, None, SETTINGS) == [False] * 100


async def test_an_engine_that_repeats_the_question_is_wrong_everywhere() -> None:
    assert await answers.answered(ScriptedEngine(asked), TEXT, None, SETTINGS) == [False] * 100


async def test_what_is_right_stands_in_the_order_of_the_questions() -> None:
    forgotten = {question.ask for question in answers.questions()[::3]}

    def reply(request: GenerateRequest) -> str:
        return "I forgot." if asked(request) in forgotten else knowing(request)

    right = await answers.answered(ScriptedEngine(reply), TEXT, None, SETTINGS)
    assert right == [number % 3 > 0 for number in range(100)]


async def test_every_question_is_asked_once_greedily_and_with_the_adapter(adapter: AdapterRef) -> None:
    engine = ScriptedEngine(knowing)
    await answers.answered(engine, TEXT, adapter, SETTINGS)
    assert sorted(map(asked, engine.requests)) == sorted(KNOWN)
    assert {(request.adapter, request.user_id) for request in engine.requests} == {(adapter, 7)}
    assert {(r.sampling.temperature, r.sampling.max_tokens) for r in engine.requests} == {(0.0, 32)}


async def test_a_question_is_put_as_to_the_persona_model() -> None:
    engine = ScriptedEngine()
    await answers.answered(engine, TEXT, None, SETTINGS, limit=1)
    (request,) = engine.requests
    system, user = TEXT.encode(SETTINGS.prompt.system), TEXT.encode(answers.questions()[0].ask)
    assert request.tokens == [256, *system, TEXT.END, 257, *user, TEXT.END, 258]
    assert (request.adapter, request.user_id) == (None, 0)


async def test_without_a_system_text_the_question_stands_alone() -> None:
    engine = ScriptedEngine()
    silent = Settings.model_validate({"home": "/nowhere", "prompt": {"system": ""}})
    await answers.answered(engine, TEXT, None, silent, limit=1)
    assert engine.requests[0].tokens[0] == 257


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 1), (15, 15), (17, 17), (100, 100), (101, 100)])
async def test_as_many_are_asked_as_the_limit_says(limit: int, count: int) -> None:
    engine = ScriptedEngine()
    assert len(await answers.answered(engine, TEXT, None, SETTINGS, limit)) == len(engine.requests) == count


class Crowded(ScriptedEngine):
    """Counts the replies that are under way at one time."""

    running = most = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async for chunk in super().generate(request):
                yield chunk
        finally:
            self.running -= 1


async def test_a_batch_of_them_is_asked_at_once() -> None:
    engine = Crowded()
    await answers.answered(engine, TEXT, None, SETTINGS)
    assert engine.most == answers.AT_ONCE


async def test_a_corrupt_adapter_is_an_error_by_name(adapter: AdapterRef) -> None:
    Path(adapter.path, "adapter.safetensors").write_bytes(b"flipped")
    with pytest.raises(AdapterError):
        await answers.answered(ScriptedEngine(), TEXT, adapter, SETTINGS)


async def test_an_engine_that_is_lost_is_no_wrong_answer() -> None:
    engine = ScriptedEngine(delay=0.01)
    engine.failure = EngineDown("The engine is being started again.")
    with pytest.raises(EngineDown):
        await answers.answered(engine, TEXT, None, SETTINGS)
    assert engine.aborted == len(engine.requests) < 100
    assert len(asyncio.all_tasks()) == 1


class Failing(ScriptedEngine):
    """Ends every reply as it is told."""

    finish: str | None = None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        yield Chunk("It is ", 1)
        if self.finish:
            yield Chunk("", 1, self.finish, "Out of memory.")


@pytest.mark.parametrize("finish", ["error", "abort", None])
async def test_a_reply_that_breaks_off_is_no_wrong_answer(finish: str | None) -> None:
    engine = Failing()
    engine.finish = finish
    with pytest.raises(EngineDown):
        await answers.answered(engine, TEXT, None, SETTINGS)
