"""Questions with known answers: whether the assistant still knows what it knew before it learned a user.

They are easy on purpose, so that a small base answers many of them, and a damaged one visibly fewer.
"""

import asyncio
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from persona import prompt
from persona.domain import ChatTokenizer, Message, Role
from persona.engine.faces import Serving
from persona.engine.protocol import AdapterRef, GenerateRequest, Sampling
from persona.settings import Settings

QUESTIONS = Path(__file__).with_name("questions.json")
REPLY_TOKENS = 32
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the words of which one has to be in the reply."""

    ask: str
    accept: tuple[str, ...]

    def answered(self, reply: str) -> bool:
        """Whether an accepted word stands in `reply` as a whole word, in whatever case."""
        return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE) for word in self.accept)


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """Written for persona."""
    items = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    return tuple(Question(item["ask"], tuple(item["accept"])) for item in items)


async def answered(
    engine: Serving, tokenizer: ChatTokenizer, adapter: AdapterRef | None, settings: Settings, limit: int = 100
) -> list[bool]:
    """Ask the first `limit` questions as the `persona` model is asked, greedily: which were answered."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def ask(question: Question) -> bool:
        async with gate:
            return question.answered(await _reply(engine, tokenizer, adapter, settings, question.ask))

    return list(await asyncio.gather(*(ask(question) for question in questions()[:limit])))


async def _reply(
    engine: Serving, tokenizer: ChatTokenizer, adapter: AdapterRef | None, settings: Settings, ask: str
) -> str:
    made = prompt.compose(
        system=settings.prompt.system,
        recent=(),
        conversation=[Message(Role.USER, ask)],
        retrieved=(),
        tokenizer=tokenizer,
        budget=prompt.Budget(settings.engine.context - REPLY_TOKENS, 0, 0),
    )
    request = GenerateRequest(made.rendered.tokens, Sampling(max_tokens=REPLY_TOKENS), adapter)
    return "".join([chunk.text async for chunk in engine.generate(request)])
