"""Asking the model as somebody without a history asks the assistant, and waiting for the whole reply."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from persona import prompt
from persona.domain import ChatTokenizer, Finish, Message, Role
from persona.engine.faces import Serving
from persona.engine.protocol import AdapterRef, Chunk, GenerateRequest, Sampling
from persona.errors import EngineDown
from persona.settings import Settings


@dataclass(frozen=True, slots=True)
class Said:
    """A reply; `whole` if the model itself ended it."""

    text: str
    whole: bool


def request(
    ask: str, sampling: Sampling, adapter: AdapterRef | None, *, tokenizer: ChatTokenizer, settings: Settings
) -> GenerateRequest:
    """The prompt that serving composes for somebody without a history."""
    composed = prompt.compose(
        system=settings.prompt.system,
        recent=(),
        conversation=[Message(Role.USER, ask)],
        retrieved=(),
        tokenizer=tokenizer,
        budget=prompt.Budget(total=settings.engine.context - sampling.max_tokens, recent=0, retrieved=0),
    )
    return GenerateRequest(composed.rendered.tokens, sampling, adapter, adapter.user_id if adapter else 0)


async def reply(engine: Serving, asked: GenerateRequest) -> Said:
    """Raises EngineDown for a reply that was broken off: it says nothing about the model."""
    said = []
    async with aclosing(cast(AsyncGenerator[Chunk], engine.generate(asked))) as chunks:
        async for chunk in chunks:
            said.append(chunk.text)
            if chunk.finish in (Finish.STOP, Finish.LENGTH):
                return Said("".join(said), chunk.finish == Finish.STOP)
            if chunk.finish is not None:
                raise EngineDown(chunk.error or "The engine broke the reply off; try again.")
    raise EngineDown("The engine ended the reply without a reason; try again.")
