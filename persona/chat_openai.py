"""OpenAI's chat completion as it stands on the wire: what is taken, what is refused, how an answer looks.

Unknown fields are ignored; a known field whose value would change the answer's meaning is refused by name.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from persona import chat_format, chat_sampling
from persona.chat import UNKNOWN_MODEL, require_question
from persona.chat_reply import Ask, Piece, Reply, about
from persona.chat_sampling import Limits, Wishes
from persona.domain import Finish, Message, Role
from persona.engine.protocol import Sampling, TokenLogprob, replace
from persona.errors import Busy, NotFound, PersonaError, RequestError, TooLarge

MAX_MESSAGES = 4096
MAX_MODEL_CHARS = 64

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}
_CONVERSATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
# What may stand in a field that we do not serve: any of these means "not asked for".
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
Spell = Callable[[int], bytes]  # what a token stands for
_FINISH = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.ABORT: "length", Finish.ERROR: "length"}


class WireMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Completion(Wishes):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[WireMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    ignore_eos: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    tools: Any = None
    functions: Any = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Any = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def understand(wire: Completion, limits: Limits) -> Ask:
    """The ask that a body stands for. Raises RequestError or NotFound that names the field."""
    _refuse_unserved(wire)
    if len(wire.model) > MAX_MODEL_CHARS:
        raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")
    ask = Ask(
        model=wire.model,
        messages=_messages(wire.messages),
        sampling=_sampling(wire, limits),
        max_tokens=_max_tokens(wire, limits.reply),
        choices=chat_sampling.choices(wire.n),
        store=wire.store is not False,
        conversation=_conversation(wire.metadata),
        think=_think(wire),
    )
    require_question(ask.messages)
    return ask


def completion(replies: Sequence[Reply], head: dict[str, Any], spell: Spell) -> dict[str, Any]:
    """A whole answer. What persona adds stands beside the choices, for the first, and in each if there are more."""
    choices = [_choice(reply, spell) for reply in replies]
    if len(replies) > 1:
        choices = [{**choice, "persona": about(reply)} for choice, reply in zip(choices, replies, strict=True)]
    answer = {"object": "chat.completion", "choices": choices, "usage": usage(replies), "persona": about(replies[0])}
    return {**head, **answer}


def _choice(reply: Reply, spell: Spell) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.answer, "refusal": None}
    if reply.thought:
        message["reasoning_content"] = reply.thought
    return {
        "index": reply.index,
        "message": message,
        "logprobs": logprobs(reply, reply.logprobs, spell),
        "finish_reason": finish_reason(reply),
    }


def delta(piece: Piece) -> dict[str, Any]:
    """What a piece adds to the message: a thought apart from the answer, as DeepSeek and vLLM have it."""
    thought = {"reasoning_content": piece.thought} if piece.thought else {}
    return thought | ({"content": piece.answer} if piece.answer or not thought else {})


def chunk(
    head: dict[str, Any],
    delta: dict[str, Any],
    finish: str | None = None,
    index: int = 0,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A piece of a streamed answer."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def logprobs(reply: Reply, found: Sequence[TokenLogprob], spell: Spell) -> dict[str, Any] | None:
    """What is told of the tokens of a reply, or of a piece of it; None if nobody asked."""
    if reply.ask.sampling.logprobs is None:
        return None
    content = [
        {
            **_told(one.token, one.logprob, spell),
            "top_logprobs": [_told(token, value, spell) for token, value in one.top],
        }
        for one in found
    ]
    return {"content": content, "refusal": None}


def _told(token: int, logprob: float, spell: Spell) -> dict[str, Any]:
    """A part of a character is shown as U+FFFD, and its bytes say which."""
    content = spell(token)
    return {"token": content.decode(errors="replace"), "bytes": list(content), "logprob": logprob}


def head(reply: Reply, identity: str, created: int, base: str) -> dict[str, Any]:
    """What every part of one answer has in common."""
    model = reply.ask.model
    return {"id": identity, "created": created, "model": model, "system_fingerprint": fingerprint(reply, base)}


def fingerprint(reply: Reply, base: str) -> str:
    """Names the weights: base and version (0: none)."""
    return f"fp_{base[:8]}_{reply.version.number if reply.version else 0}"


def finish_reason(reply: Reply) -> str:
    """In OpenAI's words, which have none for a reply that was cut short but by length."""
    return _FINISH[reply.finish or Finish.ABORT]


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Of all choices together; they have one prompt, and the first of them says what the prefix cache had of it."""
    prompt, made = len(replies[0].sheet.prompt.rendered.tokens), sum(reply.tokens for reply in replies)
    found = {"cached_tokens": replies[0].cached}
    whole = prompt + made
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": whole, "prompt_tokens_details": found}


def error_body(error: PersonaError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, "invalid_request_error")
    kind = "server_error" if error.status >= 500 else kind
    told = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": told | ({"retry_after": error.retry_after} if isinstance(error, Busy) else {})}


def _refuse_unserved(wire: Completion) -> None:
    for name, harmless in _HARMLESS.items():
        value = getattr(wire, name)
        if value is not None and value not in harmless:
            raise RequestError(f"{name} is not supported with this value.", code="unsupported_value", param=name)


def _messages(wire: list[WireMessage]) -> tuple[Message, ...]:
    if len(wire) > MAX_MESSAGES:
        raise TooLarge(f"A conversation has at most {MAX_MESSAGES} messages.", param="messages")
    messages = (_message(number, message) for number, message in enumerate(wire))
    return tuple(message for message in messages if message is not None)


def _message(number: int, wire: WireMessage) -> Message | None:
    """None for a message without words, such as an assistant's bare tool call."""
    role = _ROLES.get(wire.role)
    if role is None:
        names = ", ".join(_ROLES)
        raise RequestError(f"The role of a message is one of {names}.", param=f"messages[{number}].role")
    if wire.content is None:
        return None
    if isinstance(wire.content, str):
        return Message(role, wire.content)
    return Message(role, "\n".join(_part(number, part) for part in wire.content))


def _part(number: int, part: dict[str, Any]) -> str:
    text = part.get("text") if part.get("type") == "text" else None
    if not isinstance(text, str):
        sentence = "Content parts other than text are not supported, and nothing is fetched from elsewhere."
        raise RequestError(sentence, code="unsupported_value", param=f"messages[{number}].content")
    return text


def _max_tokens(wire: Completion, most: int) -> int | None:
    if wire.max_completion_tokens is not None:
        return chat_sampling.max_tokens("max_completion_tokens", wire.max_completion_tokens, most)
    return chat_sampling.max_tokens("max_tokens", wire.max_tokens, most)


def _think(wire: Completion) -> bool | None:
    """As OpenAI asks for it, or as vLLM does; of what a template may be told nothing else is heeded."""
    if wire.reasoning_effort is not None:
        return wire.reasoning_effort != "none"
    told = wire.chat_template_kwargs if isinstance(wire.chat_template_kwargs, dict) else {}
    asked = told.get("enable_thinking", told.get("thinking"))
    return asked if isinstance(asked, bool) else None


def _sampling(wire: Completion, limits: Limits) -> Sampling:
    grammar = chat_format.of_openai(wire.response_format)
    if grammar and wire.ignore_eos:
        raise RequestError(
            "A reply that is held to a format ends where the format does: leave ignore_eos out.", param="ignore_eos"
        )
    endless = wire.ignore_eos is True
    return replace(chat_sampling.sampling(wire, limits), logprobs=_logprobs(wire), grammar=grammar, ignore_eos=endless)


def _logprobs(wire: Completion) -> int | None:
    top = chat_sampling.top_logprobs("top_logprobs", wire.top_logprobs or 0)
    if top and not wire.logprobs:
        raise chat_sampling.refused("top_logprobs", "needs logprobs to be true")
    return top if wire.logprobs else None


def _conversation(metadata: dict[str, Any] | None) -> str | None:
    value = (metadata or {}).get("conversation_id")
    if value is None:
        return None
    if not isinstance(value, str) or not _CONVERSATION.fullmatch(value):
        sentence = "A conversation id has 1 to 64 letters, digits, dots, colons, dashes or underscores."
        raise RequestError(sentence, code="unsupported_value", param="metadata.conversation_id")
    return value
