"""The bare base's own replies: generated once, kept in a file, rehearsed beside a user's words."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from histories import TEXT

from jobs import answers, evaluate, rehearsal
from jobs.rehearsal import AT_ONCE, Rehearsal
from persona.engine.protocol import Chunk, Example, GenerateRequest, Sampling
from persona.engine.scripted import ScriptedEngine
from persona.errors import EngineDown
from persona.settings import Settings

OWN = [Example(list(range(40)), list(range(20, 40)))] * 10  # 200 targets


def settings(home: Path, share: float = 0.5, system: str = "Be brief.") -> Settings:
    return Settings.model_validate({"home": home, "learning": {"rehearsal": share}, "prompt": {"system": system}})


def made(engine: ScriptedEngine, configuration: Settings, base: str = "base") -> Rehearsal:
    return Rehearsal(engine, TEXT, configuration, lambda: base)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def test_no_request_is_one_that_judges() -> None:
    judging = [question.ask for question in answers.questions()] + [ask for ask, _ in evaluate.reference()]
    asks = rehearsal.requests()
    assert len(asks) == len({ask.casefold() for ask in asks}) >= 100
    for ask in asks:
        for other in judging:
            common = len(words(ask) & words(other)) / len(words(ask) | words(other))
            assert common < 0.6, (ask, other)


async def test_a_share_of_the_own_words_is_rehearsed(tmp_path: Path) -> None:
    found = await made(ScriptedEngine("Twenty-six letters, all told."), settings(tmp_path)).examples(OWN, 7)
    assert all(example.distil for example in found)
    assert 100 <= sum(len(example.targets) for example in found) < 100 + len(found[0].targets)


async def test_nothing_is_rehearsed_when_told(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    assert await made(engine, settings(tmp_path, share=0.0)).examples(OWN, 7) == []
    assert engine.requests == []


async def test_an_example_is_what_the_bare_base_said_to_a_neutral_request(tmp_path: Path) -> None:
    engine = ScriptedEngine("That is easy.")
    found = await made(engine, settings(tmp_path)).examples(OWN, 7)
    assert all(request.adapter is None and request.sampling.temperature == 1 for request in engine.requests)
    first = found[0]
    assert TEXT.decode([first.tokens[target] for target in first.targets]) == "That is easy."
    assert first.targets[-1] == len(first.tokens) - 1
    assert first.tokens[-1] == TEXT.END
    asked = [request.tokens for request in engine.requests]
    assert first.tokens[: first.targets[0]] in asked
    assert TEXT.decode(first.tokens).startswith("Be brief.")


async def test_a_reply_that_was_cut_does_not_teach_to_stop_there(tmp_path: Path) -> None:
    engine = ScriptedEngine(" ".join(["on"] * 200))
    (framed, *_) = await made(engine, settings(tmp_path)).replies(["Go?"])
    assert framed.tokens[-1] != TEXT.END


async def test_who_is_drawn_depends_on_the_run_alone(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: f"I was asked {len(request.tokens)} tokens.")
    one = await made(engine, settings(tmp_path / "a")).examples(OWN, 1)
    assert await made(engine, settings(tmp_path / "b")).examples(OWN, 1) == one
    assert await made(engine, settings(tmp_path / "a")).examples(OWN, 2) != one


async def test_what_is_missing_alone_is_generated_also_after_a_start(tmp_path: Path) -> None:
    engine, configuration = ScriptedEngine(), settings(tmp_path)
    await made(engine, configuration).replies(["One?", "Two?", "One?"])
    assert len(engine.requests) == 2
    again = made(engine, configuration)
    await again.replies(["Two?", "Three?"])
    await again.replies(["One?", "Three?"])
    assert len(engine.requests) == 3


@pytest.mark.parametrize("change", ["base", "system", "sampling"])
async def test_replies_of_another_base_or_system_text_or_drawn_otherwise_are_forgotten(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    await made(engine, settings(tmp_path)).replies(["One?"])
    if change == "sampling":
        monkeypatch.setattr(rehearsal, "SAMPLING", Sampling(max_tokens=48))
    other = settings(tmp_path, system="Be long.") if change == "system" else settings(tmp_path)
    await made(engine, other, "other" if change == "base" else "base").replies(["One?"])
    assert len(engine.requests) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"base": "base"}', b"\xff\x00"])
async def test_a_broken_file_costs_no_more_than_new_replies(tmp_path: Path, content: bytes) -> None:
    (tmp_path / rehearsal.FILE).write_bytes(content)
    engine = ScriptedEngine()
    assert await made(engine, settings(tmp_path)).replies(["One?"])
    assert len(engine.requests) == 1
    assert "One?" in json.loads((tmp_path / rehearsal.FILE).read_text())["said"]


async def test_without_a_place_for_the_file_replies_are_kept_in_memory(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    one = made(engine, settings(tmp_path / "nowhere"))
    await one.replies(["One?"])
    await one.replies(["One?"])
    assert len(engine.requests) == 1


async def test_few_are_generated_at_once(tmp_path: Path) -> None:
    engine = Counting(delay=0.001)
    await made(engine, settings(tmp_path)).replies([f"{i}?" for i in range(20)])
    assert engine.most == AT_ONCE


async def test_an_engine_that_breaks_off_fails_the_run_and_keeps_nothing(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.failure = EngineDown("gone")
    one = made(engine, settings(tmp_path))
    with pytest.raises(EngineDown):
        await one.examples(OWN, 7)
    engine.failure = None
    assert await one.examples(OWN, 7)


async def test_a_base_that_says_nothing_leaves_nothing_to_rehearse_but_the_end(tmp_path: Path) -> None:
    found = await made(ScriptedEngine(""), settings(tmp_path)).examples(OWN, 7)
    assert {len(example.targets) for example in found} == {1}


class Counting(ScriptedEngine):
    """Counts who is generated at one time."""

    def __init__(self, delay: float) -> None:
        super().__init__(delay=delay)
        self.now = self.most = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async for chunk in super().generate(request):
                yield chunk
                await asyncio.sleep(0)
        finally:
            self.now -= 1
