"""The form of a reply: text, any JSON object, or JSON of a schema, on every surface.

What a schema may cost is bounded before it reaches the engine: in bytes and levels here, and in time and memory by a
process of its own that tries it out (persona.engine.schema).
"""

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections import OrderedDict
from typing import Any

import msgspec

from persona.chat_sampling import refused
from persona.engine import schema
from persona.errors import RequestError

MAX_BYTES = 64 << 10  # of a schema as JSON
MAX_NESTING = 64  # levels
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_TYPES = "text, json_object or json_schema"
_WAIT = 20.0  # seconds for a process that may have two on the processor
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
    if len(msgspec.json.encode(wanted)) > MAX_BYTES:
        raise refused(name, f"has at most {MAX_BYTES} bytes")
    if not _is_shallow(wanted):
        raise refused(name, f"is nested at most {MAX_NESTING} levels deep")
    return schema.grammar(wanted)


def _is_shallow(value: Any, levels: int = MAX_NESTING) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(one, levels - 1) for one in inner)


class Schemas:
    """Tries schemas out, one at a time, and remembers what came of it."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, str] = OrderedDict()  # grammar → what is wrong with it, ""
        self._turn = asyncio.Lock()

    async def check(self, grammar: str) -> None:
        """Raises RequestError for one that cannot be followed."""
        if grammar and (problem := await self._problem(grammar)):
            sentence = f"The schema cannot be followed: {problem}."
            raise RequestError(sentence, code="invalid_schema", param="response_format")

    async def _problem(self, grammar: str) -> str:
        if grammar not in self._known:
            async with self._turn:
                problem = self._known.get(grammar)  # perhaps it was tried while this one waited
                self._known[grammar] = await _tried(grammar) if problem is None else problem
        self._known.move_to_end(grammar)
        problem = self._known[grammar]
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return problem


async def _tried(grammar: str) -> str:
    """What is wrong with a grammar, or ""."""
    command = (sys.executable, "-m", "persona.engine.schema")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
    try:
        async with asyncio.timeout(_WAIT):
            problem, _ = await process.communicate(grammar.encode())
    except TimeoutError:
        return schema.LARGE
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return problem.decode() if process.returncode == 0 else schema.LARGE
