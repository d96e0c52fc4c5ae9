"""The base's tokenizer and chat template, without torch or transformers: starts in milliseconds.

Content never becomes a special token: the template is rendered around marks that no text contains, and each
message is encoded on its own as plain text. That also gives the exact token range of every message.
"""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from persona.domain import Message, Rendered
from persona.errors import ModelError, RequestError

# Two noncharacters of Unicode frame each message's number; they are removed from all content.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_LONG = 4096  # characters from which a text is encoded without the GIL: two milliseconds
# How vocabularies spell what is no letter: SentencePiece a space and a byte, byte-level BPE every byte.
_SPACE = "\u2581"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _letters() -> dict[str, bytes]:
    """The letter that byte-level BPE has for each byte (GPT-2's table): its own, or one from 256 on if it has none."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    codes = {byte: byte for byte in shown} | {byte: 256 + place for place, byte in enumerate(hidden)}
    return {chr(code): bytes([byte]) for byte, code in codes.items()}


_LETTERS = _letters()


class Text:
    """Implements persona.domain.ChatTokenizer for a prepared model folder."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: dict[str, str]) -> None:
        self._plain = tokenizer  # special tokens in its input stay text
        self._plain.encode_special_tokens = True
        self._marked = Tokenizer.from_str(tokenizer.to_str())
        self._marked.encode_special_tokens = False
        self._special = special
        try:
            self._template = _environment().from_string(template)
        except TemplateError as error:
            raise ModelError(f"The model's chat template cannot be read: {error}.") from None
        self._added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])
        # Template text repeats from request to request: "<|im_end|>\n<|im_start|>user\n" and its like.
        self._frame = lru_cache(maxsize=1024)(self._encode_frame)

    @classmethod
    def load(cls, folder: Path) -> "Text":
        """Read tokenizer.json and chat.json of a prepared model. Raises ModelError if they are not there."""
        try:
            chat = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"The tokenizer of the prepared model cannot be read ({error}).") from None
        return cls(tokenizer, chat["template"], chat["special"])

    @property
    def vocab(self) -> int:
        return int(self._plain.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return _ids(self._plain, text.replace(_OPEN, "").replace(_CLOSE, ""))

    def raw(self, text: str) -> tuple[list[int], int]:
        begin: list[int] = self._marked.encode("", add_special_tokens=True).ids
        return [*begin, *_ids(self._marked, text)], len(begin)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._plain.decode(list(tokens), skip_special_tokens=True))

    def piece(self, token: int) -> bytes:
        """b"" for a number that the tokenizer does not use."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._plain.id_to_token(token) or ""
        if self._byte_level:
            return b"".join(_LETTERS.get(letter, letter.encode()) for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def render(self, messages: Sequence[Message], *, reply: bool, think: bool | None = None) -> Rendered:
        """Raises RequestError when the base's template refuses the order of roles."""
        marked = [{"role": m.role.value, "content": f"{_OPEN}{i}{_CLOSE}"} for i, m in enumerate(messages)]
        pieces = _MARK.split(self._apply(marked, reply, think))
        tokens = list(self._frame(pieces[0]))
        spans = [(0, 0)] * len(messages)
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            start = len(tokens)
            tokens += self.encode(messages[int(number)].text)
            ending = self._frame(after)
            # The end-of-turn token belongs to the message: learning when to stop is part of learning to speak.
            spans[int(number)] = (start, len(tokens) + bool(ending))
            tokens += ending
        return Rendered(tokens, tuple(spans))

    def _apply(self, messages: list[dict[str, str]], reply: bool, think: bool | None) -> str:
        asked = {} if think is None else {"enable_thinking": think}
        try:
            return self._template.render(messages=messages, add_generation_prompt=reply, **asked, **self._special)
        except TemplateError as error:
            raise RequestError(f"The model's chat template does not take these messages: {error}.") from None

    def _encode_frame(self, text: str) -> tuple[int, ...]:
        return tuple(self._marked.encode(text, add_special_tokens=False).ids)


class Detokenizer:
    """Turns a growing list of tokens into text, holding back characters that are still incomplete.

    Decodes from the last safe border only, so a long reply costs no more per token than a short one.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._border = 0  # everything before it was given out
        self._given = ""  # text of tokens[self._border:] that was given out

    def add(self, token: int) -> str:
        """The new text that `token` completes, or ""."""
        self._tokens.append(token)
        text = self._text.decode(self._tokens[self._border :])
        if text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """Whatever is still held back, broken characters included."""
        return self._give(self._text.decode(self._tokens[self._border :]))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        if len(self._tokens) - self._border > 16:  # keep one token of context: some tokenizers join across it
            last = self._text.decode(self._tokens[-1:])
            if "\ufffd" not in last:  # else it is a part of a character
                self._border, self._given = len(self._tokens) - 1, last
        return new


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text`, and none around them.

    `encode` keeps the GIL, so that not even in a thread of its own a long text lets the event loop have a turn, for
    seconds. A batch lets go of it, but is worked off by the library's own few threads, where what is short would wait
    for what is long.
    """
    if len(text) < _LONG:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for, as transformers documents it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
