"""What learning a voice must not cost: the bare base's own replies, rehearsed in training and asked for by the gate.

An adapter that has seen nothing but its user's words soon talks like them when it should answer. So a part of what
every run trains on is replies of the bare base to a list of neutral requests (self-distillation: what is wanted at each
token is the base's whole distribution). The gate asks how likely its replies to other requests still are. Replies
are generated as they are needed, once for a base and a system text, and kept in a file: a run that goes on after a stop
finds the same ones.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np
import structlog

from jobs import asking
from jobs.asking import Said
from persona import frames
from persona.domain import ChatTokenizer, Message, Role
from persona.engine.faces import Serving
from persona.engine.protocol import Example, Sampling
from persona.settings import Settings

REQUESTS = Path(__file__).with_name("rehearsal.json")
FILE = "replies.json"
SAMPLING = Sampling(max_tokens=48, temperature=1.0, seed=7)  # as the base talks, not only its likeliest words
AT_ONCE = 4  # users are served meanwhile

log = structlog.get_logger()


class _Replies(msgspec.Struct):
    """The file: replies by request, of one base under one system text, drawn in one way."""

    base: str
    system: str
    sampling: Sampling
    said: dict[str, Said]


class Rehearsal:
    """The bare base's replies as examples and as a measure."""

    def __init__(self, engine: Serving, tokenizer: ChatTokenizer, settings: Settings, base: Callable[[], str]) -> None:
        self._engine, self._tokenizer, self._settings, self._base = engine, tokenizer, settings, base
        self._file = settings.home / FILE
        self._known: _Replies | None = None
        self._alone = asyncio.Lock()

    async def examples(self, own: Sequence[Example], seed: int) -> list[Example]:
        """Replies to rehearse beside a run's `own` examples: learning.rehearsal of their targets, drawn by `seed`.

        Raises Busy or EngineDown if the engine cannot generate now.
        """
        wanted = self._settings.learning.rehearsal * sum(len(example.targets) for example in own)
        found: list[Example] = []
        drawn = _drawn(len(requests()), seed)
        while wanted > 0:
            some = [requests()[next(drawn)] for _ in range(AT_ONCE)]
            for framed in await self.replies(some):
                if wanted > 0 and framed.targets:
                    found.append(Example(framed.tokens, framed.targets, distil=True))
                wanted -= max(1, len(framed.targets))
        return found

    async def replies(self, asks: Sequence[str]) -> list[frames.Framed]:
        """What the bare base says to each, in the assistant's role after the system text."""
        async with self._alone:
            known = await self._load()
            missing = [ask for ask in dict.fromkeys(asks) if ask not in known.said]
            if missing:
                known.said |= zip(missing, await self._generated(missing), strict=True)
                await asyncio.to_thread(_write, self._file, known)
        return [self._framed(ask, known.said[ask]) for ask in asks]

    async def _load(self) -> _Replies:
        wanted = _Replies(self._base(), self._settings.prompt.system, SAMPLING, {})
        if self._known is None:
            self._known = await asyncio.to_thread(_read, self._file)
        if self._known is None or msgspec.structs.replace(self._known, said={}) != wanted:
            self._known = wanted
        return self._known

    async def _generated(self, asks: Sequence[str]) -> list[Said]:
        free = asyncio.Semaphore(AT_ONCE)

        async def one(ask: str) -> Said:
            async with free:
                asked = asking.request(ask, SAMPLING, None, tokenizer=self._tokenizer, settings=self._settings)
                return await asking.reply(self._engine, asked)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(ask)) for ask in asks]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    def _framed(self, ask: str, said: Said) -> frames.Framed:
        system = self._settings.prompt.system
        before = [Message(Role.SYSTEM, system)] if system else []
        framed = frames.reply([*before, Message(Role.USER, ask)], said.text, tokenizer=self._tokenizer)
        kept = len(framed.targets) if said.whole else len(framed.targets) - 1  # else it did not end there
        return framed.clipped(targets=kept, tokens=self._settings.engine.context)


@lru_cache(maxsize=1)
def requests() -> tuple[str, ...]:
    """What an assistant is asked, of many kinds; none of it is in the reference set or among the questions."""
    return msgspec.json.decode(REQUESTS.read_bytes(), type=tuple[str, ...])


def _drawn(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count` in a new order each time round."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.permutation(count).tolist()


def _read(file: Path) -> _Replies | None:
    """None for what cannot be read: the replies are then generated again."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Replies)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None


def _write(file: Path, replies: _Replies) -> None:
    """Replace the file. Where that fails, the replies serve until the next start."""
    part = file.with_suffix(".part")
    try:
        part.write_bytes(msgspec.json.encode(replies))
        part.replace(file)
    except OSError as error:
        log.warning("the base's replies could not be kept", error=type(error).__name__)
