"""Ollama's chat as it stands on the wire: what is taken, what is refused, how an answer looks.

Unknown fields and options are ignored, and those that only a loader of models would heed (num_ctx, keep_alive); a
known one whose value would change the answer's meaning is refused by name. Durations are measured, in nanoseconds.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from persona import chat_format, chat_sampling, chat_tools
from persona.chat import UNKNOWN_MODEL, require_question
from persona.chat_reply import Ask, Reply, about
from persona.chat_sampling import Limits, Names, Wishes
from persona.chat_tools import Call, Tool
from persona.domain import Finish, Message, Role
from persona.engine.protocol import replace
from persona.errors import NotFound, PersonaError, RequestError, TooLarge

TAG = ":latest"  # what Ollama's clients append to a name that has no tag
MAX_MESSAGES = 4096
MAX_MODEL_CHARS = 64
_ROLES = {"system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}
_NOTHING = "(no output)"  # a tool may give back nothing, but the model shall see that it ran
# What may stand in a field that we do not serve: any of these means "not asked for".
_HARMLESS: dict[str, tuple[Any, ...]] = {"logprobs": (False,), "top_logprobs": (0,)}
_HARMLESS_PROMPT: dict[str, tuple[Any, ...]] = {"suffix": ("",), "template": ("",), "raw": (False,), "context": ([],)}
_HARMLESS_OPTIONS: dict[str, tuple[Any, ...]] = {"mirostat": (0,)}
_NAMES = Names("options.", {"repetition_penalty": "repeat_penalty"})
_FINISH = {Finish.STOP: "stop"}


class Signature(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: Any = None


class WireTool(msgspec.Struct):
    function: Signature
    type: str = "function"


class Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None


class WireCall(msgspec.Struct):
    function: Function


class WireMessage(msgspec.Struct):
    """`content` of an assistant may be missing where it only calls tools; its `thinking` is not read again."""

    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[WireCall] | None = None


class Options(msgspec.Struct):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    mirostat: Any = None

    @property
    def wishes(self) -> Wishes:
        return Wishes(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repeat_penalty,
            seed=self.seed,
            stop=self.stop,
        )


class Question(msgspec.Struct):
    """The body of POST /api/chat. `think` false keeps thoughts from being sent and, where the model's template can say
    so, from being thought."""

    model: str
    messages: list[WireMessage]
    stream: bool | None = None
    tools: list[WireTool] | None = None
    options: Options | None = None
    think: bool | str | None = None
    format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None


class Prompt(msgspec.Struct):
    """The body of POST /api/generate: one message, and the system text before it."""

    model: str
    prompt: str | None = None
    system: str | None = None
    stream: bool | None = None
    options: Options | None = None
    think: bool | str | None = None
    format: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    suffix: str | None = None
    images: list[Any] | None = None
    template: str | None = None
    raw: bool | None = None
    context: Any = None

    def question(self) -> Question:
        """The same as a chat. Raises RequestError that names the field."""
        _refuse_unserved(self, _HARMLESS_PROMPT, "")
        told = [WireMessage("system", self.system)] if self.system else []
        messages = [*told, WireMessage("user", self.prompt, self.images)]
        shape = {name: getattr(self, name) for name in ("stream", "options", "think", "format", *_HARMLESS)}
        return Question(self.model, messages, **shape)


@dataclass(frozen=True, slots=True)
class Times:
    """Of the event loop, in seconds: the request came, the reply was over."""

    began: float
    ended: float


def understand(wire: Question, limits: Limits) -> Ask:
    """The ask that a body stands for. Raises RequestError or NotFound that names the field."""
    options = wire.options or Options()
    _refuse_unserved(wire, _HARMLESS, "")
    _refuse_unserved(options, _HARMLESS_OPTIONS, "options.")
    grammar = chat_format.of_ollama(wire.format)
    if grammar and wire.tools:
        raise _unsupported("A reply of a format cannot call tools: send format or tools.", "format")
    ask = Ask(
        model=plain(wire.model),
        messages=(*_told(wire.tools or []), *_messages(wire.messages)),
        sampling=replace(chat_sampling.sampling(options.wishes, limits, _NAMES), grammar=grammar),
        max_tokens=_max_tokens(options.num_predict, limits.reply),
        tools=bool(wire.tools),
        think=None if wire.think is None else bool(wire.think),
    )
    require_question(ask.messages)
    return ask


def plain(model: str) -> str:
    """The name without Ollama's tag. Raises NotFound for what cannot be a name."""
    if len(model) > MAX_MODEL_CHARS:
        raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")
    return model.removesuffix(TAG)


def part(
    model: str, now: datetime, content: str = "", thinking: str = "", calls: tuple[Call, ...] = ()
) -> dict[str, Any]:
    """A piece of a streamed answer."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"model": model, "created_at": now.isoformat(), "message": message, "done": False}


def generated(part: dict[str, Any]) -> dict[str, Any]:
    """The same as /api/generate has it."""
    message = part.pop("message")
    thought = {"thinking": message["thinking"]} if "thinking" in message else {}
    return {**part, "response": message["content"], **thought}


def loaded(model: str, now: datetime) -> dict[str, Any]:
    """The answer to a request without words, which has a model loaded: the one there is always is."""
    return {**part(model, now), "done": True, "done_reason": "load"}


def ending(reply: Reply, times: Times) -> dict[str, Any]:
    """What the last line of an answer has beside a part's fields. Nothing is loaded, so no load_duration."""
    first = times.ended if reply.first is None else reply.first
    return {
        "done": True,
        "done_reason": _FINISH.get(reply.finish or Finish.ABORT, "length"),
        "total_duration": _nanoseconds(times.ended - times.began),
        "prompt_eval_count": len(reply.sheet.prompt.rendered.tokens),
        "prompt_eval_duration": _nanoseconds(first - times.began),  # to the first token, waiting included
        "eval_count": reply.tokens,
        "eval_duration": _nanoseconds(times.ended - first),
        "persona": about(reply),
    }


def error_body(error: PersonaError) -> dict[str, Any]:
    """Ollama's error object."""
    return {"error": error.message}


def _refuse_unserved(wire: msgspec.Struct, fields: dict[str, tuple[Any, ...]], place: str) -> None:
    for name, harmless in fields.items():
        value = getattr(wire, name)
        if value is not None and value not in harmless:
            raise _unsupported(f"{place}{name} is not supported with this value.", f"{place}{name}")


def _told(tools: list[WireTool]) -> list[Message]:
    """Before the client's own system text, which may begin with the time: what stays the same stays in the cache."""
    for number, tool in enumerate(tools):
        if tool.type != "function" or not tool.function.name:
            raise _unsupported("A tool is a function with a name.", f"tools[{number}]")
    told = [Tool(tool.function.name, tool.function.description, tool.function.parameters) for tool in tools]
    return [chat_tools.tell(told)] if told else []


def _messages(wire: list[WireMessage]) -> list[Message]:
    if len(wire) > MAX_MESSAGES:
        raise TooLarge(f"A conversation has at most {MAX_MESSAGES} messages.", param="messages")
    return [message for number, one in enumerate(wire) for message in _said(number, one)]


def _said(number: int, wire: WireMessage) -> list[Message]:
    """What is said, and the calls that go with it as a message of their own: they are no turn."""
    role = _ROLES.get(wire.role)
    if role is None:
        names = ", ".join(_ROLES)
        raise RequestError(f"The role of a message is one of {names}.", param=f"messages[{number}].role")
    if wire.images:
        raise _unsupported("Images are not supported.", f"messages[{number}].images")
    if role is Role.TOOL:
        return [Message(role, wire.content or _NOTHING)]
    said = Message(role, wire.content or "")
    if role is not Role.ASSISTANT or not wire.tool_calls:
        return [said]
    calls = [Call(call.function.name, call.function.arguments or {}) for call in wire.tool_calls]
    return [said, chat_tools.called(calls)]


def _max_tokens(num_predict: int | None, most: int) -> int | None:
    """Below zero Ollama has no bound but the context."""
    wanted = None if num_predict is None or num_predict < 0 else num_predict
    return chat_sampling.max_tokens("options.num_predict", wanted, most)


def _unsupported(sentence: str, param: str) -> RequestError:
    return RequestError(sentence, code="unsupported_value", param=param)


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1_000_000_000))
