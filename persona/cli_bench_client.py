"""The measuring client of `persona bench`: streaming chat requests over HTTP, and when each piece of a reply came.

Open loop: requests go out when they are due, however many are under way, and times count from when they were due, so
that a service (or a client) that lags is not spared. Closed loop: so many clients, each asks when its last reply has
ended.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import aiohttp

from persona.cli_link import decoded, events, refuse
from persona.errors import Busy, ConfigurationError, EngineDown, PersonaError, RequestError, StorageFull
from persona.wording import Wording
from persona.workload import Request, Workload, requests

SILENCE = 600.0  # seconds without a byte after which a request counts as failed
_ENGINE = "persona_engine_"  # before the names of what the engine counts


@dataclass(frozen=True, slots=True)
class Limit:
    """When a run ends: after so many requests, or when none is sent any more after so many seconds."""

    requests: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds since the start of the run."""

    request: Request
    start: float  # when it was due or, in a closed loop, sent
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    end: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0  # of the reply, as the service counts them
    finished: bool = False
    failure: str = ""  # in one word; empty for a reply of the length that was asked for
    refused: bool = False  # the failure is that the service was full and said so


class Target:
    """The service under measurement: its address and one key a user."""

    def __init__(self, session: aiohttp.ClientSession, url: str, keys: Sequence[str]) -> None:
        self._session, self._url, self.keys = session, url, keys

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, keys: Sequence[str]) -> AsyncIterator["Target"]:
        """`url`: with or without /v1."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            yield cls(session, url.rstrip("/").removesuffix("/v1"), keys)

    async def count(self, model: str, text: str, reply: int) -> int:
        """Tokens of the prompt that the first user's `text` becomes. Raises PersonaError in the service's words."""
        body = {**_body(model, text, reply), "store": False}
        try:
            async with self._session.post(f"{self._url}/v1/me/why", json=body, headers=self._headers(0)) as answer:
                await refuse(answer)
                return int((await decoded(answer))["tokens"])
        except PersonaError as error:
            if error.code != "context_length_exceeded":
                raise
            raise RequestError(
                "Prompt and reply are longer than the model reads: shorten --prompt or --reply."
            ) from None
        except (KeyError, TypeError):
            raise ConfigurationError(f"What answers at {self._url} is no persona: check --url.") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise ConfigurationError(f"Nobody answers at {self._url}: is the service running there?") from None

    async def wording(self, model: str, workload: Workload) -> Wording:
        """Texts for that model, of which the shortest and the longest fit. Raises PersonaError."""
        longest = workload.reply.high
        wording = await Wording.measure(lambda text: self.count(model, text, longest))
        for tokens in (workload.prompt.low, workload.prompt.high):
            if (found := await self.count(model, wording.text(tokens, 0), longest)) != tokens:
                raise ConfigurationError(f"A prompt of {tokens} tokens has {found}: words join for this tokenizer.")
        return wording

    async def engine(self) -> dict[str, float]:
        """What the engine counts, by its metrics; nothing where there are none."""
        try:
            async with self._session.get(f"{self._url}/metrics", headers=self._headers(0)) as answer:
                lines = (await answer.text()).splitlines() if answer.status == 200 else []
        except (aiohttp.ClientError, OSError):
            return {}
        pairs = [line.removeprefix(_ENGINE).split() for line in lines if line.startswith(_ENGINE)]
        return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2}

    async def ask(self, model: str, text: str, outcome: Outcome, began: float) -> None:
        """Stream one reply into `outcome`; nothing is raised for what goes wrong in it."""
        request = outcome.request
        body = _body(model, text, request.reply)
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "store": False}
        headers = self._headers(request.user)
        try:
            async with self._session.post(f"{self._url}/v1/chat/completions", json=body, headers=headers) as answer:
                await refuse(answer)
                async for event in events(answer):
                    _hear(outcome, event, time.perf_counter() - began)
            if not outcome.finished:
                outcome.failure = "broken_off"
            elif outcome.tokens != request.reply:
                outcome.failure = "wrong_length"
        except PersonaError as error:
            outcome.failure = str(error.code)
            outcome.refused = _is_refusal(error)
        except TimeoutError:
            outcome.failure = "silence"
        except (aiohttp.ClientError, OSError):
            outcome.failure = "connection"
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            outcome.failure = "not_openai"
        outcome.end = time.perf_counter() - began

    def _headers(self, user: int) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[user]}"}


@dataclass(slots=True)
class Measured:
    """What a run has found so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    sent: int = 0
    late: float = 0.0  # seconds by which the client itself sent a request too late, at most
    seconds: float = 0.0  # from the start to the last end
    before: dict[str, float] = field(default_factory=dict)  # what the engine counted
    after: dict[str, float] = field(default_factory=dict)
    complete: bool = False


class Run:
    """One measurement; `found` holds what has come of it, also when it is cancelled."""

    def __init__(
        self, target: Target, model: str, wording: Wording, workload: Workload, clients: int, number: int = 0
    ) -> None:
        """number: of this measurement on one service: each has words of its own, which no cache has seen."""
        self._target, self._model, self._wording = target, model, wording
        self._workload, self._clients, self._number = workload, clients, number
        self.found = Measured()
        self._began = 0.0

    async def go(self, limit: Limit) -> None:
        """Send everything and wait for every reply."""
        found = self.found
        found.before = await self._target.engine()
        self._began = time.perf_counter()
        try:
            await (self._open(limit) if self._workload.rate else self._closed(limit))
            found.complete = True
        finally:
            last = max((outcome.end for outcome in found.outcomes), default=0.0)
            found.seconds = last if found.complete else self._now()
        found.after = await self._target.engine()

    async def _open(self, limit: Limit) -> None:
        due = requests(self._workload)
        if limit.seconds is not None:
            last = limit.seconds
            due = takewhile(lambda request: request.at < last, due)
        async with asyncio.TaskGroup() as group:
            for request in islice(due, limit.requests):
                await asyncio.sleep(max(0.0, request.at - self._now()))
                self.found.late = max(self.found.late, self._now() - request.at)
                group.create_task(self._one(request, request.at))

    async def _closed(self, limit: Limit) -> None:
        waiting = self._until(islice(requests(self._workload), limit.requests), limit.seconds)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._client(waiting))

    async def _client(self, waiting: Iterator[Request]) -> None:
        for request in waiting:
            await self._one(request, self._now())

    def _until(self, waiting: Iterator[Request], seconds: float | None) -> Iterator[Request]:
        return waiting if seconds is None else takewhile(lambda _: self._now() < seconds, waiting)

    async def _one(self, request: Request, start: float) -> None:
        self.found.sent += 1
        outcome = Outcome(request, start)
        text = self._wording.text(request.prompt, request.seed + self._number * 2**32)
        await self._target.ask(self._model, text, outcome, self._began)
        self.found.outcomes.append(outcome)

    def _now(self) -> float:
        return time.perf_counter() - self._began


def _body(model: str, text: str, reply: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": reply, "temperature": 0}


def _hear(outcome: Outcome, event: dict[str, Any], now: float) -> None:
    for choice in event.get("choices") or ():
        if choice["delta"].get("content"):
            outcome.pieces.append(now)
        outcome.finished |= choice.get("finish_reason") is not None
    if usage := event.get("usage"):
        outcome.prompt_tokens, outcome.tokens = usage["prompt_tokens"], usage["completion_tokens"]


def _is_refusal(error: PersonaError) -> bool:
    """Whether the service was full and said so; a broken engine and a full disk are failures."""
    return error.code == Busy.code or (
        isinstance(error, Busy) and error.code not in (EngineDown.code, StorageFull.code)
    )
