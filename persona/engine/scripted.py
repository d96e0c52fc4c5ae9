"""An engine that says what it is told, and a tokenizer made of bytes: for tests, demos of clients, and dry runs.

It keeps the three faces to the letter (tests/contracts) without a model: same order of chunks, same errors, same
meaning of closing an iterator.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

from persona.domain import Message, Rendered
from persona.engine import checkpoint_file
from persona.engine.checkpoint_file import Header, State
from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    GenerateRequest,
    Health,
    PrefillRequest,
    Progress,
    ScoreRequest,
    TokenLogprob,
    TrainRequest,
)
from persona.errors import AdapterError, Busy, RequestError, TrainingFailed

BASE = "scripted"  # in place of a hash
Reply = str | Sequence[str] | Callable[[GenerateRequest], str]


class ScriptedEngine:
    """Replies with `reply`: one text, one after another, or a function of the request.

    `score` gives the log-probabilities (default: −1 each). `trainable` is what training writes; None makes it fail.
    Everything asked of it is kept in `requests`, `scored`, `trained`, `staged`, `flipped`, `dropped`, `aborted`. Its
    checkpoints hold a step and no numbers.
    """

    def __init__(
        self,
        reply: Reply = "Hello.",
        *,
        delay: float = 0.0,
        score: Callable[[ScoreRequest], list[float]] | None = None,
        trainable: bytes | None = b"scripted adapter",
        steps: int = 3,
    ) -> None:
        self._reply = reply
        self.delay = delay
        self.predicts = score
        self.trainable = trainable
        self.steps = steps
        self.failure: Exception | None = None
        self._training = False
        self._resumed = asyncio.Event()
        self._resumed.set()
        self.requests: list[GenerateRequest] = []
        self.scored: list[ScoreRequest] = []
        self.prefilled: list[PrefillRequest] = []
        self.trained: list[TrainRequest] = []
        self.staged: list[AdapterRef] = []
        self.flipped: list[AdapterRef] = []
        self.dropped: list[int] = []
        self.aborted = 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        if not request.tokens:
            raise RequestError("The prompt is empty.")
        self._check(request.adapter)
        words = self._words(self._say(request))
        if request.sampling.ignore_eos:
            words = list(islice(cycle(words), request.sampling.max_tokens + 1))
        kept = words[: request.sampling.max_tokens]
        finish = "stop" if len(kept) == len(words) else "length"
        ended = False
        try:
            for count, word in enumerate(kept, 1):
                await asyncio.sleep(self.delay)
                if self.failure is not None:
                    raise self.failure
                yield Chunk(word, count, logprobs=_told(word, request.sampling.logprobs))
            ended = True
            yield Chunk("", len(kept), finish)
        finally:
            self.aborted += not ended

    async def score(self, request: ScoreRequest) -> list[float]:
        self._check(request.adapter)
        wanted = sorted(set(request.targets))
        if request.targets != wanted or (wanted and not 1 <= wanted[0] <= wanted[-1] < len(request.tokens)):
            raise RequestError("Targets to score must ascend and lie inside the tokens, after the first.")
        self.scored.append(request)
        await asyncio.sleep(0)
        return self.predicts(request) if self.predicts else [-1.0] * len(request.targets)

    async def tell(self, request: ScoreRequest) -> list[TokenLogprob]:
        found = zip(request.targets, await self.score(request), strict=True)
        return [_alternatives(request.tokens[target], value, request.top or 0) for target, value in found]

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        return [await self.score(request) for request in requests]

    async def prefill(self, request: PrefillRequest) -> None:
        self._check(request.adapter)
        self.prefilled.append(request)

    async def health(self) -> Health:
        training = self._training
        return Health(BASE, model="scripted", device="none", weights="none", context=8192, training=training)

    async def stage(self, ref: AdapterRef) -> None:
        self._check(ref)
        self.staged.append(ref)

    async def flip(self, ref: AdapterRef) -> None:
        self.flipped.append(ref)

    async def drop(self, user_id: int) -> None:
        self.dropped.append(user_id)

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        if self._training:
            raise Busy("Another training is running; try again when it has ended.", retry_after=30)
        self.trained.append(request)
        self._training = True
        try:
            begin = await asyncio.to_thread(_taken_up, request)
            for step in range(begin + 1, self.steps + 1):
                await asyncio.sleep(self.delay)
                await self._resumed.wait()
                await asyncio.to_thread(_keep, request, step)
                yield self._progress(step, resumed=begin)
            if self.trainable is None:
                raise TrainingFailed("The loss was not finite at step 1; nothing was published.")
            for folder, content in ((request.out, self.trainable), (request.half, self.trainable + b" by half")):
                if folder:
                    await asyncio.to_thread(Path(folder, "adapter.safetensors").write_bytes, content)
            yield self._progress(self.steps, resumed=begin, done=True)
        finally:
            self._training = False

    def _progress(self, step: int, *, resumed: int, done: bool = False) -> Progress:
        return Progress(step, self.steps, 1.0 / step, 100 * step, 0.1 * step, done=done, resumed=resumed)

    @property
    def paused(self) -> bool:
        return not self._resumed.is_set()

    async def pause(self) -> None:
        self._resumed.clear()

    async def resume(self) -> None:
        self._resumed.set()

    def _say(self, request: GenerateRequest) -> str:
        if callable(self._reply):
            return self._reply(request)
        if isinstance(self._reply, str):
            return self._reply
        return self._reply[(len(self.requests) - 1) % len(self._reply)]

    @staticmethod
    def _words(text: str) -> list[str]:
        """One chunk a word; a word carries the space before it."""
        head, *rest = text.split(" ")
        return [head, *(" " + word for word in rest)] if text else []

    @staticmethod
    def _check(ref: AdapterRef | None) -> None:
        if ref is None:
            return
        try:
            content = Path(ref.path, "adapter.safetensors").read_bytes()
        except FileNotFoundError:
            raise AdapterError(f"The file of version {ref.number} is missing.") from None
        except OSError:
            raise Busy("The adapter could not be loaded now; try again later.", retry_after=10) from None
        if hashlib.sha256(content).hexdigest() != ref.sha256:
            raise AdapterError(f"The file of version {ref.number} does not match its checksum.")


def _told(word: str, top: int | None) -> list[TokenLogprob]:
    """A word is told as its first byte, with −1."""
    return [] if top is None else [_alternatives(word.encode()[0], -1.0, top)]


def _alternatives(token: int, logprob: float, top: int) -> TokenLogprob:
    """The tokens with the next numbers follow, each less likely by 1."""
    return TokenLogprob(token, logprob, [(token + place, logprob - place) for place in range(top)])


def _taken_up(request: TrainRequest) -> int:
    """The step after which this training goes on, 0 at its beginning."""
    if not request.checkpoint:
        return 0
    found = checkpoint_file.read(Path(request.checkpoint), checkpoint_file.fingerprint(request, BASE))
    return found.header.step if found else 0


def _keep(request: TrainRequest, step: int) -> None:
    """Keep the state after `step`, as long as there is a folder for it."""
    if not request.checkpoint:
        return
    name = checkpoint_file.fingerprint(request, BASE)
    state = State(Header(name, step, 1.0 / step, 1.0, 1.0, 100 * step, 0.1 * step, 0, step), {})
    with contextlib.suppress(FileNotFoundError):
        for _ in checkpoint_file.write(Path(request.checkpoint), state):
            pass


class ScriptedText:
    """A ChatTokenizer of bytes: token = byte, and one token above 255 for each mark of the template."""

    MARKS: tuple[str, ...] = ("system", "user", "assistant", "tool")
    END = 255 + len(MARKS) + 1
    vocab = END + 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def raw(self, text: str) -> tuple[list[int], int]:
        return self.encode(text), 0

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def render(self, messages: Sequence[Message], *, reply: bool, think: bool | None = None) -> Rendered:
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        for message in messages:
            tokens.append(256 + self.MARKS.index(message.role.value))
            start = len(tokens)
            tokens += [*self.encode(message.text), self.END]
            spans.append((start, len(tokens)))
        if reply:
            tokens.append(256 + self.MARKS.index("assistant"))
        return Rendered(tokens, tuple(spans))
