"""The values of a chat request, and a reply while it is under way.

A `Reply` is the mailbox between the task that generates and the handler that sends. Aborting it is the only way to
cancel that task, and once nothing more is generated it is too late for that: recording is never disturbed.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from persona.chat_thoughts import Thoughts
from persona.chat_tools import Call, Ear, Heard
from persona.domain import Caller, EntryId, Finish, Message, Version
from persona.engine.protocol import Chunk, Sampling, TokenLogprob
from persona.prompt import Prompt
from storage.history import Placement


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for. `max_tokens` None: as many as fit. `choices`: how many replies."""

    model: str
    messages: tuple[Message, ...]
    sampling: Sampling
    max_tokens: int | None = None
    store: bool = True
    conversation: str | None = None
    tools: bool = False  # the reply may call tools
    echo: bool = False  # the prompt stands before the reply, and is told of like it
    choices: int = 1
    think: bool | None = None  # before the answer; None: as the model is used to


@dataclass(frozen=True, slots=True)
class Voice:
    """Who answers: a model name resolved for one caller. `version` None is the bare base."""

    name: str
    system: str
    version: Version | None
    personal: bool  # knows the caller: history stands in its prompt, and the exchange becomes history


@dataclass(frozen=True, slots=True)
class Sheet:
    """What the engine gets for one ask, and where the exchange stands in history."""

    voice: Voice
    placement: Placement | None  # None: the base, which has no history
    prompt: Prompt
    recorded: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply, text and calls of tools; the last one has its finish, one for an echo stands for the prompt.

    `text` is what was generated, `answer` and `thought` what of it is one or the other. `logprobs`: of the tokens whose
    text begins in it, if they were asked for.
    """

    text: str
    finish: Finish | None = None
    calls: tuple[Call, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    echo: bool = False
    answer: str = ""
    thought: str = ""


class Reply:
    """A reply under way: the mailbox between the task that generates it and the handler that sends it.

    After the last piece `turn` is the id under which the reply is stored, None if it is not. `text` has no calls in
    it: they are for the client alone, and no history; but thoughts, which `answer` has not.
    """

    def __init__(
        self,
        caller: Caller,
        ask: Ask,
        sheet: Sheet,
        index: int = 0,
        mail: "Mail | None" = None,
        before: "Reply | None" = None,
    ) -> None:
        self.index = index  # among the replies to the same ask
        self.before = before  # the first to the same prompt, which this one is made after
        self.begun = asyncio.Event()  # whether the engine has read the prompt, or never will
        self.caller = caller
        self.ask = ask
        self.sheet = sheet
        self.recorded = sheet.recorded
        self.tokens = 0
        self.cached = 0  # tokens of the prompt that needed no computing
        self.first: float | None = None  # time of the event loop at the first token
        self.calls: list[Call] = []
        self.logprobs: list[TokenLogprob] = []
        self.echoed: list[TokenLogprob] | None = None  # of the prompt, from its second token on; None until it is told
        self.finish: Finish | None = None
        self.turn: EntryId | None = None
        self.task: asyncio.Task[None] | None = None
        self.settled = False  # nothing more is generated; from here on it is recorded undisturbed
        self._said: list[str] = []
        self._answer: list[str] = []
        self._thought: list[str] = []
        thinking = sheet.prompt.thinking and not ask.sampling.grammar
        self._thoughts = Thoughts(thinking=thinking)
        self._ear = Ear(thinking=thinking) if ask.tools else None
        # Never longer than max_tokens, because the engine sends at most one piece a token.
        self._mail: Mail = mail or asyncio.Queue()

    @property
    def version(self) -> Version | None:
        return self.sheet.voice.version

    @property
    def conversation(self) -> str | None:
        return self.sheet.placement.conversation if self.sheet.placement else None

    @property
    def text(self) -> str:
        return "".join(self._said)

    @property
    def answer(self) -> str:
        return "".join(self._answer)

    @property
    def thought(self) -> str:
        """What stood between <think> tags before the answer."""
        return "".join(self._thought)

    async def next(self, seconds: float | None = None) -> Piece | None:
        """The next piece, or None after `seconds` of silence. Raises what made the reply fail."""
        mail = await _open(self._mail, seconds)
        return mail[1] if mail else None

    def on_end(self, call: Callable[["Reply"], None]) -> None:
        """Have `call(reply)` called once, when the reply is over and on record."""
        assert self.task is not None
        self.task.add_done_callback(lambda _: call(self))

    def abort(self) -> None:
        """Stop generating. What was said so far is recorded; a reply that has ended is left alone."""
        if self.task is not None and not self.settled:
            self.settled = True
            self.task.cancel()

    def echo(self, told: list[TokenLogprob]) -> None:
        """The prompt stands before the reply; `told` may be empty."""
        self.echoed = told
        self._mail.put_nowait((self, Piece("", logprobs=tuple(told), echo=True)))

    def hear(self, chunk: Chunk) -> None:
        self.tokens = max(self.tokens, chunk.tokens)
        self.cached = max(self.cached, chunk.cached)
        self.first = self.first or asyncio.get_running_loop().time()
        self.begun.set()
        self.logprobs += chunk.logprobs
        self._deliver(self._ear.hear(chunk.text) if self._ear else Heard(chunk.text), tuple(chunk.logprobs))
        if self._ear and chunk.finish in (Finish.STOP, Finish.LENGTH):
            self._deliver(self._ear.end())

    def _deliver(self, heard: Heard, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        if heard.text or heard.calls or logprobs:
            self._said.append(heard.text)
            self.calls += heard.calls
            self._post(Piece(heard.text, None, heard.calls, logprobs), self._thoughts.hear(heard.text))

    def _post(self, piece: Piece, parts: tuple[str, str]) -> None:
        answer, thought = parts
        self._answer.append(answer)
        self._thought.append(thought)
        self._mail.put_nowait((self, replace(piece, answer=answer, thought=thought)))

    def end(self, finish: Finish, failure: Exception | None = None) -> None:
        self.begun.set()
        if self.finish is None:
            self.finish = finish
            if any(rest := self._thoughts.end()):  # what might have become a tag
                self._post(Piece(""), rest)
            self._mail.put_nowait((self, failure or Piece("", finish)))


Mail = asyncio.Queue[tuple[Reply, Piece | Exception]]


class Choices:
    """The replies to one ask, which are made side by side and end one by one."""

    def __init__(self, replies: Sequence[Reply], mail: Mail) -> None:
        self.replies = tuple(replies)
        self._mail = mail
        self._open = len(self.replies)

    @property
    def first(self) -> Reply:
        return self.replies[0]

    @property
    def ended(self) -> bool:
        """Whether the last piece of every reply was taken out."""
        return not self._open

    async def next(self, seconds: float | None = None) -> tuple[Reply, Piece] | None:
        """The next piece of any reply, or None after `seconds` of silence. Raises what made a reply fail."""
        mail = await _open(self._mail, seconds)
        self._open -= mail is not None and mail[1].finish is not None
        return mail

    def on_end(self, call: Callable[[Reply], None]) -> None:
        for reply in self.replies:
            reply.on_end(call)

    def abort(self) -> None:
        for reply in self.replies:
            reply.abort()


async def _open(mail: Mail, seconds: float | None) -> tuple[Reply, Piece] | None:
    try:
        async with asyncio.timeout(seconds):
            reply, content = await mail.get()
    except TimeoutError:
        return None
    if isinstance(content, Exception):
        raise content
    return reply, content


def about(reply: Reply) -> dict[str, Any]:
    """What persona adds: the turn's id for feedback, and where the exchange went."""
    return {
        "turn": reply.turn,
        "version": reply.version.number if reply.version else None,
        "conversation": reply.conversation,
        "recorded": reply.recorded,
        "finish": reply.finish,
    }
