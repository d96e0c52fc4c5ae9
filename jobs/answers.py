"""Easy questions with known answers: does the assistant still answer under an adapter?

Each is asked once and alone, greedily, as the persona model is asked. A reply is right when it holds an accepted answer
as a whole word, whatever its case and accents: «eight» stands neither in «eighteen» nor in «twenty-eight», and 8 not
in 8.5.
"""

import asyncio
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec

from jobs import asking
from persona.domain import ChatTokenizer
from persona.engine.faces import Serving
from persona.engine.protocol import AdapterRef, Sampling
from persona.settings import Settings

QUESTIONS = Path(__file__).with_name("questions.json")
AT_ONCE = 16  # the engine decodes them as one batch
SAMPLING = Sampling(max_tokens=32, temperature=0.0)

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked, and the words of which a right reply holds one; numbers stand as digits and as words."""

    ask: _Text
    accept: Annotated[tuple[_Text, ...], msgspec.Meta(min_length=1)]

    def answered_by(self, reply: str) -> bool:
        said = _folded(reply)
        return any(_whole(_folded(answer)).search(said) for answer in self.accept)


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """Written for persona, subjects mixed. Raises msgspec.ValidationError if the file is not what it should be."""
    return msgspec.json.decode(QUESTIONS.read_bytes(), type=tuple[Question, ...])


async def answered(
    engine: Serving,
    tokenizer: ChatTokenizer,
    adapter: AdapterRef | None,
    settings: Settings,
    limit: int = 100,
) -> list[bool]:
    """Which of the first `limit` questions are answered right under `adapter` (None: the bare base), in their order.

    Raises AdapterError if the file cannot be served, Busy if the engine cannot generate now; the other questions are
    given up then.
    """
    free = asyncio.Semaphore(AT_ONCE)

    async def right(question: Question) -> bool:
        async with free:
            asked = asking.request(question.ask, SAMPLING, adapter, tokenizer=tokenizer, settings=settings)
            return question.answered_by((await asking.reply(engine, asked)).text)

    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(right(question)) for question in questions()[:limit]]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in asked]


def _folded(text: str) -> str:
    """Without case and accents; «H₂O» is «h2o»."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return "".join(sign for sign in apart if not unicodedata.combining(sign))


def _whole(answer: str) -> re.Pattern[str]:
    """`answer` where it is no part of a longer or hyphenated word, or of a longer number; −5 is not 5 either."""
    return re.compile(rf"(?<![\w−-])(?<!\d[.,]){re.escape(answer)}(?![.,]\d|-?\w)")
