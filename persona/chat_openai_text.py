"""OpenAI's text completion as it stands on the wire: raw text that goes on, with nothing around it.

A prompt is all that the model reads: no chat template, no system text, no history. It has no roles, so nobody can say
which words are the caller's own, and nothing of it becomes history.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from persona import chat_sampling
from persona.chat import UNKNOWN_MODEL
from persona.chat_openai import MAX_MODEL_CHARS, Spell, StreamOptions, finish_reason
from persona.chat_reply import Ask, Piece, Reply, about
from persona.chat_sampling import Limits, Wishes, refused
from persona.engine.protocol import TokenLogprob, replace
from persona.errors import NotFound, TooLarge

MAX_PROMPTS = 128
MAX_REPLIES = 128  # prompts times n
MAX_TOLD = 1 << 18  # log-probabilities of prompts: some 300 bytes each until they are sent
DEFAULT_TOKENS = 16  # OpenAI's
# What may stand in a field that we do not serve.
_HARMLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "is not supported: the model goes on with a text and cannot fill a gap; leave it out"),
    "response_format": (({"type": "text"},), "is for /v1/chat/completions; leave it out here"),
}


class TextCompletion(Wishes):
    """The body of POST /v1/completions."""

    model: str
    prompt: Any
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    ignore_eos: bool | None = None
    suffix: Any = None
    response_format: Any = None

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


@dataclass(frozen=True, slots=True)
class RawPrompt:
    """What the model goes on with. The first `hidden` tokens are the base's own beginning and stand in no text."""

    text: str
    tokens: list[int]
    hidden: int = 0


Encode = Callable[[str], tuple[list[int], int]]  # ChatTokenizer.raw


def understand(wire: TextCompletion, limits: Limits) -> Ask:
    """The ask that a body stands for. Raises RequestError or NotFound that names the field."""
    for name, (harmless, sentence) in _HARMLESS.items():
        if getattr(wire, name) is not None and getattr(wire, name) not in harmless:
            raise refused(name, sentence)
    if len(wire.model) > MAX_MODEL_CHARS:
        raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")
    choices = chat_sampling.choices(wire.n)
    if wire.best_of not in (None, choices):
        raise refused("best_of", "is not supported beyond n: ask for n choices and choose among them by logprobs")
    top = None if wire.logprobs is None else chat_sampling.top_logprobs("logprobs", wire.logprobs)
    return Ask(
        model=wire.model,
        messages=(),
        sampling=replace(
            chat_sampling.sampling(wire, limits), logprobs=top, ignore_eos=wire.ignore_eos is True, tell_end=True
        ),
        max_tokens=_max_tokens(wire, limits.reply),
        store=False,
        choices=choices,
        echo=bool(wire.echo),
    )


def prompts(wire: TextCompletion, encode: Encode, spell: Spell, vocab: int) -> list[RawPrompt]:
    """The prompts of a body. Raises RequestError for what is none, TooLarge for too many, or too much to be told."""
    given = _given(wire.prompt)
    if len(given) > MAX_PROMPTS or len(given) * (wire.n or 1) > MAX_REPLIES:
        sentence = f"A request has at most {MAX_PROMPTS} prompts, and {MAX_REPLIES} replies in all (prompts times n)."
        raise TooLarge(sentence, param="prompt")
    found = [_prompt(one, encode, spell, vocab) for one in given]
    tokens = sum(len(one.tokens) for one in found) if wire.echo else 0
    if wire.logprobs is not None and tokens * (wire.n or 1) * (1 + wire.logprobs) > MAX_TOLD:
        sentence = f"At most {MAX_TOLD} log-probabilities are told of prompts: send fewer or shorter ones at a time."
        raise TooLarge(sentence, param="logprobs")
    return found


def completion(
    replies: Sequence[Reply], prompts: Sequence[RawPrompt], head: dict[str, Any], spell: Spell
) -> dict[str, Any]:
    """A whole answer."""
    choices = [_whole(reply, prompt_of(reply, prompts), spell) for reply in replies]
    answer = {"object": "text_completion", "choices": choices, "usage": usage(replies, prompts)}
    return {**head, **answer, "persona": about(replies[0])}


class Teller:
    """The pieces of one choice as they go out: text, and what is told of its tokens with their places in it."""

    def __init__(self, reply: Reply, prompt: RawPrompt, spell: Spell) -> None:
        self._reply, self._prompt, self._spell = reply, prompt, spell
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = 0

    def choice(self, piece: Piece) -> dict[str, Any]:
        """One piece as a choice of a streamed chunk."""
        if piece.finish is not None:
            return _choice(self._reply, "", None, finish_reason(self._reply))
        text = self._prompt.text if piece.echo else piece.text
        return _choice(self._reply, text, self.told(piece.logprobs, echo=piece.echo), None)

    def told(self, found: Sequence[TokenLogprob], *, echo: bool) -> dict[str, Any] | None:
        """OpenAI's lists, one entry a token; None if nobody asked. Nothing comes before the first of a prompt."""
        if self._reply.ask.sampling.logprobs is None:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if echo:
            self._add(lists, self._prompt.tokens[0], None, None, hidden=self._prompt.hidden > 0)
        for place, one in enumerate(found, 1):
            # The token itself always stands among its alternatives.
            top = {_shown(self._spell(token)): value for token, value in [*one.top, (one.token, one.logprob)]}
            self._add(lists, one.token, one.logprob, top, hidden=echo and place < self._prompt.hidden)
        return lists

    def _add(
        self,
        lists: dict[str, list[Any]],
        token: int,
        logprob: float | None,
        top: dict[str, float] | None,
        *,
        hidden: bool,
    ) -> None:
        content = self._spell(token)
        lists["tokens"].append(_shown(content))
        lists["token_logprobs"].append(logprob)
        lists["top_logprobs"].append(top)
        lists["text_offset"].append(self._chars)
        if not hidden:
            self._chars += len(self._decoder.decode(content))


def chunk(head: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A piece of a streamed answer."""
    return {**head, "object": "text_completion", "choices": choices}


def usage(replies: Sequence[Reply], prompts: Sequence[RawPrompt]) -> dict[str, int]:
    read, made = sum(len(prompt.tokens) for prompt in prompts), sum(reply.tokens for reply in replies)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def prompt_of(reply: Reply, prompts: Sequence[RawPrompt]) -> RawPrompt:
    """Choices come prompt by prompt."""
    return prompts[reply.index // reply.ask.choices]


def _whole(reply: Reply, prompt: RawPrompt, spell: Spell) -> dict[str, Any]:
    teller, text, told = Teller(reply, prompt, spell), reply.text, None
    if reply.echoed is not None:
        text, told = prompt.text + text, teller.told(reply.echoed, echo=True)
    after = teller.told(reply.logprobs, echo=False)
    if told and after:
        after = {name: told[name] + after[name] for name in told}
    return _choice(reply, text, after, finish_reason(reply))


def _choice(reply: Reply, text: str, told: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"text": text, "index": reply.index, "logprobs": told, "finish_reason": finish}


def _shown(content: bytes) -> str:
    """A token as text, and as OpenAI shows one that is a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _max_tokens(wire: TextCompletion, most: int) -> int:
    if wire.max_tokens == 0 and wire.echo:  # the prompt is scored and nothing more
        return 0
    return chat_sampling.max_tokens("max_tokens", wire.max_tokens, most) or min(DEFAULT_TOKENS, most)


def _given(value: Any) -> list[str | list[int]]:
    """A text, texts, token numbers, or lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are(value, int):
            return [value]
        if _are(value, str) or all(isinstance(one, list) and _are(one, int) for one in value):
            return value
    raise refused("prompt", "is a text, a list of texts, a list of token numbers, or a list of such lists")


def _are(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _prompt(given: str | list[int], encode: Encode, spell: Spell, vocab: int) -> RawPrompt:
    if isinstance(given, str):
        tokens, hidden = encode(given)
        made = RawPrompt(given, tokens, hidden)
    else:
        if not all(0 <= token < vocab for token in given):
            raise refused("prompt", f"names tokens by their numbers in the model's vocabulary, 0 to {vocab - 1}")
        made = RawPrompt(b"".join(map(spell, given)).decode(errors="replace"), given)
    if not made.tokens:
        raise refused("prompt", "is empty: give the model at least one token to go on with")
    return made
