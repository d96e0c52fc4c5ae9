"""Tools as the Hermes and Qwen families write them: <tools> in the system text, <tool_call> in a reply.

A reply is text and calls. What is not a whole, readable call stays text to the letter, so nothing that the model said
is lost, and of a call no tag gets through. A tool's schema is told to the model and not enforced. Calls are no turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from persona.domain import Message, Role
from persona.errors import RequestError, TooLarge

MAX_TOOLS = 128
MAX_TOOL_BYTES = 64 << 10  # of all descriptions together, as JSON
MAX_NESTING = 64  # levels of a schema and of arguments

_CALL = ("<tool_call>", "</tool_call>")
_THOUGHT = ("<think>", "</think>")  # a call that stands in a thought is none
_TOLD = """\
You may call the tools whose signatures stand between the <tools> tags, one a line:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as a JSON object between <tool_call> tags, one object a call:
<tool_call>
{{"name": <name of the tool>, "arguments": <object of arguments>}}
</tool_call>
What the tool gave back follows between <tool_response> tags. Call a tool only if it helps, else answer in words."""


@dataclass(frozen=True, slots=True)
class Tool:
    """What a client can do for the model. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: Any = None


@dataclass(frozen=True, slots=True)
class Call:
    """What the model wants done."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a piece of a reply adds: text to show, calls to make."""

    text: str = ""
    calls: tuple[Call, ...] = ()


def tell(tools: Sequence[Tool]) -> Message:
    """The system text that names the tools. Raises TooLarge or RequestError above one of the limits."""
    if len(tools) > MAX_TOOLS:
        raise TooLarge(f"A request has at most {MAX_TOOLS} tools.", param="tools")
    for tool in tools:
        _refuse_deep(tool.parameters)
    lines = [msgspec.json.encode(_signature(tool)).decode() for tool in tools]
    if sum(len(line.encode()) for line in lines) > MAX_TOOL_BYTES:
        raise TooLarge(f"The descriptions of all tools have at most {MAX_TOOL_BYTES} bytes.", param="tools")
    return Message(Role.SYSTEM, _TOLD.format(tools="\n".join(lines)))


def called(calls: Sequence[Call]) -> Message:
    """Calls that the model made earlier, as it wrote them. Raises RequestError above MAX_NESTING."""
    for call in calls:
        _refuse_deep(call.arguments)
    written = (msgspec.json.encode({"name": call.name, "arguments": call.arguments}).decode() for call in calls)
    return Message(Role.CALL, "\n".join(f"{_CALL[0]}\n{text}\n{_CALL[1]}" for text in written))


class Ear:
    """Listens to one reply, whatever the borders of its pieces: `hear` each of them, at its end `end`."""

    def __init__(self, *, thinking: bool = False) -> None:
        """thinking: what is heard begins within a thought."""
        self._rest = ""  # not decided yet; in a call it begins with the opening tag
        self._closing: str | None = _THOUGHT[1] if thinking else None  # the tag that ends what we are in

    def hear(self, piece: str) -> Heard:
        self._rest += piece
        said: list[str] = []
        calls: list[Call] = []
        while self._step(said, calls):
            pass
        return Heard("".join(said), tuple(calls))

    def end(self) -> Heard:
        """What was held back. A call that only lacks its closing tag is one."""
        rest, self._rest = self._rest, ""
        call = _read(rest.removeprefix(_CALL[0])) if self._closing == _CALL[1] else None
        return Heard(calls=(call,)) if call else Heard(rest)

    def _step(self, said: list[str], calls: list[Call]) -> bool:
        """Decide the next part of what was heard; False if more has to come first."""
        if self._closing == _CALL[1]:
            return self._in_call(said, calls)
        if self._closing is not None:
            return self._until((self._closing,), said)
        return self._until((_CALL[0], _THOUGHT[0]), said)

    def _until(self, tags: tuple[str, ...], said: list[str]) -> bool:
        """Let everything through up to the first of `tags`, and a thought's own tags with it."""
        at, tag = min(((self._rest.find(tag), tag) for tag in tags if tag in self._rest), default=(-1, ""))
        if not tag:
            self._release(len(self._rest) - held(self._rest, tags), said)
            return False
        self._release(at if tag == _CALL[0] else at + len(tag), said)
        self._closing = {_CALL[0]: _CALL[1], _THOUGHT[0]: _THOUGHT[1]}.get(tag)
        return True

    def _in_call(self, said: list[str], calls: list[Call]) -> bool:
        at = self._rest.find(_CALL[1])
        if at < 0:
            return False
        if call := _read(self._rest[len(_CALL[0]) : at]):
            calls.append(call)
            self._rest = self._rest[at + len(_CALL[1]) :]
        else:  # perhaps another one began in the middle of it
            again = self._rest.find(_CALL[0], 1, at)
            self._release(again if again > 0 else at + len(_CALL[1]), said)
            if again > 0:
                return True
        self._closing = None
        return True

    def _release(self, chars: int, said: list[str]) -> None:
        said.append(self._rest[:chars])
        self._rest = self._rest[chars:]


class _Written(msgspec.Struct):
    """A call as models write it: some say parameters, some put the arguments into a string."""

    name: str
    arguments: dict[str, Any] | str | None = None
    parameters: dict[str, Any] | None = None


def _read(text: str) -> Call | None:
    """The call that `text` is, or None."""
    try:
        written = msgspec.json.decode(text, type=_Written)
        arguments = written.parameters if written.arguments is None else written.arguments
        if isinstance(arguments, str):
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return Call(written.name, arguments or {}) if written.name and _is_shallow(arguments) else None


def _refuse_deep(value: Any) -> None:
    if not _is_shallow(value):
        sentence = f"Parameters and arguments of tools are nested at most {MAX_NESTING} levels deep."
        raise RequestError(sentence, code="unsupported_value", param="tools")


def _is_shallow(value: Any, levels: int = MAX_NESTING) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(one, levels - 1) for one in inner)


def held(text: str, tags: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a tag."""
    longest = max(len(tag) for tag in tags) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if text.endswith(tuple(t[:n] for t in tags))), 0)


def _signature(tool: Tool) -> dict[str, Any]:
    about = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {name: value for name, value in about.items() if value is not None}}
