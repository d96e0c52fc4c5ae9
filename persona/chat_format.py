"""The form of a reply: text, any JSON object, or JSON of a schema, on every surface.

What a schema may cost is bounded before it reaches the engine: in bytes and levels here, and in time and memory by a
process of its own that tries it out (persona.engine.schema). What one user sends delays another's by one trial at most.
"""

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from persona.chat_sampling import refused
from persona.chat_turns import Turns
from persona.engine import schema
from persona.errors import Busy, RequestError

MAX_BYTES = 64 << 10  # of a schema as JSON
MAX_NESTING = 64  # levels
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TYPES = "text, json_object or json_schema"
_WAIT = 20.0  # seconds for a process that may have two on the processor
_EACH = 2  # schemas of one user that are being tried out or wait for it
_KNOWN = 128  # schemas whose verdict is remembered


def of_openai(response_format: Any) -> str:
    """`response_format` as a grammar, "" for text. Raises RequestError that names the part."""
    if response_format is None:
        return ""
    if not isinstance(response_format, dict):
        raise refused("response_format", f"is an object whose type is {_TYPES}")
    match response_format.get("type"):
        case "text":
            return ""
        case "json_object":
            return schema.grammar(_ANY_OBJECT)
        case "json_schema":
            return _of_schema(response_format.get("json_schema"))
    raise refused("response_format.type", f"is {_TYPES}")


def of_ollama(form: Any) -> str:
    """`format` as a grammar, "" for text. Raises RequestError that names it."""
    if form in (None, ""):
        return ""
    if form == "json":
        return schema.grammar(_ANY_OBJECT)
    if not isinstance(form, dict):
        raise refused("format", 'is "json" or a JSON schema')
    return _grammar("format", form)


def _of_schema(wire: Any) -> str:
    if not isinstance(wire, dict) or not isinstance(wire.get("schema"), dict):
        sentence = "is an object with the JSON schema, which is an object too, under schema"
        raise refused("response_format.json_schema", sentence)
    return _grammar("response_format.json_schema.schema", wire["schema"])


def _grammar(name: str, wanted: dict[str, Any]) -> str:
    if not _is_shallow(wanted):
        raise refused(name, f"is nested at most {MAX_NESTING} levels deep")
    if len(msgspec.json.encode(wanted)) > MAX_BYTES:
        raise refused(name, f"has at most {MAX_BYTES} bytes")
    return schema.grammar(wanted)


def _is_shallow(value: Any, levels: int = MAX_NESTING) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(one, levels - 1) for one in inner)


@dataclass(slots=True)
class _Trial:
    """A schema that is being tried out, or waits for that. `waiting`: requests that want to know."""

    user_id: int
    task: asyncio.Task[str]
    waiting: int = 0


class Schemas:
    """Tries schemas out, one at a time and users by turns, and remembers what came of it."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, str] = OrderedDict()  # grammar → what is wrong with it, ""
        self._trials: dict[str, _Trial] = {}  # by grammar
        self._turns = Turns()
        self._forgotten = 0  # times

    def forget(self) -> None:
        """What was tried out: a schema may hold what its user wrote."""
        self._known.clear()
        self._forgotten += 1

    async def check(self, grammar: str, user_id: int = 0) -> None:
        """Raises RequestError for one that cannot be followed, Busy while that cannot be said.

        user_id: whose wish it is; 0: nobody's, who may have any number tried out.
        """
        if grammar and (problem := await self._problem(grammar, user_id)):
            sentence = f"The schema cannot be followed: {problem}."
            raise RequestError(sentence, code="invalid_schema", param="response_format")

    async def _problem(self, grammar: str, user_id: int) -> str:
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return self._known[grammar]
        trial = self._trials.get(grammar) or self._begin(grammar, user_id)
        trial.waiting += 1
        try:
            return await asyncio.shield(trial.task)
        finally:
            trial.waiting -= 1
            if not trial.waiting:
                await self._end(grammar, trial)

    def _begin(self, grammar: str, user_id: int) -> _Trial:
        if user_id and sum(trial.user_id == user_id for trial in self._trials.values()) >= _EACH:
            sentence = f"{_EACH} new schemas of this user are being tried out already; try again in a moment."
            raise Busy(sentence, retry_after=schema.SECONDS, status=429, code="rate_limited")
        self._trials[grammar] = trial = _Trial(user_id, asyncio.create_task(self._try(grammar, user_id)))
        return trial

    async def _end(self, grammar: str, trial: _Trial) -> None:
        """Nobody wants to know any more, or everybody does."""
        del self._trials[grammar]
        if not trial.task.done():
            trial.task.cancel()
            await asyncio.wait([trial.task])

    async def _try(self, grammar: str, user_id: int) -> str:
        before = self._forgotten
        async with self._turns.of(user_id):
            problem = await _tried(grammar)
        if before != self._forgotten:
            return problem
        self._known[grammar] = problem
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return problem


async def _tried(grammar: str) -> str:
    """What is wrong with a grammar, or "". Raises Busy if the machine has no time to say so."""
    command = (sys.executable, "-m", "persona.engine.schema")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
    try:
        async with asyncio.timeout(_WAIT):
            problem, _ = await process.communicate(grammar.encode())
    except TimeoutError:  # its limit of processor time had ended it, had it been given any
        raise Busy("The machine is too busy to try the schema out; try again in a moment.", retry_after=5) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return problem.decode() if process.returncode == 0 else schema.LARGE
