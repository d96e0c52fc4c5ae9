"""In which role an example puts its target: turn, draft or reply.

Every frame ends with the message whose words are the target; all that stands before it is context, which the model sees
and never learns to say. The end-of-turn token belongs to the target: a voice includes where it stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from persona.domain import ChatTokenizer, Line, Message, Role

DRAFT_SYSTEM = "Write as this user: in their words, their tone and their length, as if they typed it themselves."
DRAFT_OPENING = "Write a message."
OWN = "me"  # author of the user's own lines in a draft's context


@dataclass(frozen=True, slots=True)
class Framed:
    """A token sequence and the ascending positions (≥ 1) of its target."""

    tokens: list[int]
    targets: list[int]

    def clipped(self, *, targets: int, tokens: int) -> "Framed":
        """At most so many targets and tokens: the end is cut, and with it the end-of-turn token."""
        kept = [position for position in self.targets[:targets] if position < tokens]
        return Framed(self.tokens[: kept[-1] + 1] if kept else [], kept)


def turn(context: Sequence[Message], text: str, *, tokenizer: ChatTokenizer) -> Framed:
    """The user's words in the user's role, after `context` (merged, its system message first)."""
    if context and context[-1].role is Role.USER:
        before = f"{context[-1].text}\n\n"
        return _framed([*context[:-1], Message(Role.USER, before + text)], before, tokenizer)
    return _framed([*context, Message(Role.USER, text)], "", tokenizer)


def draft(context: Sequence[Line], text: str, *, tokenizer: ChatTokenizer, quoted: str = "") -> Framed:
    """The user's words in the assistant's role, under «write as this user»; what others said is one user message.

    quoted: history that stands behind the system line.
    """
    said = script(context) or DRAFT_OPENING
    system = f"{DRAFT_SYSTEM}\n\n{quoted}" if quoted else DRAFT_SYSTEM
    messages = [Message(Role.SYSTEM, system), Message(Role.USER, said), Message(Role.ASSISTANT, text)]
    return _framed(messages, "", tokenizer)


def reply(context: Sequence[Message], text: str, *, tokenizer: ChatTokenizer) -> Framed:
    """An accepted or corrected reply in the assistant's role, after `context` (merged, its system message first)."""
    return _framed([*context, Message(Role.ASSISTANT, text)], "", tokenizer)


def heard(context: Sequence[Line]) -> list[Message]:
    """What others said before an imported message, as a turn's context: one assistant message, or none."""
    return [Message(Role.ASSISTANT, script(context))] if context else []


def lines(context: Sequence[Message]) -> list[Line]:
    """A conversation with persona as a draft's context."""
    authors = {Role.USER: OWN, Role.ASSISTANT: "assistant"}
    return [Line(authors[message.role], message.text) for message in context if message.role in authors]


def script(context: Sequence[Line]) -> str:
    """Lines as «author: text»."""
    return "\n".join(f"{line.author}: {line.text}" for line in context)


def trim(context: Sequence[Message], limit: int, tokenizer: ChatTokenizer) -> list[Message]:
    """The newest of `context` within `limit` tokens; the oldest one kept may lose its beginning."""
    texts = _newest([message.text for message in context], limit, tokenizer)
    kept = context[len(context) - len(texts) :]
    return [Message(message.role, text) for message, text in zip(kept, texts, strict=True)]


def trim_lines(context: Sequence[Line], limit: int, tokenizer: ChatTokenizer) -> list[Line]:
    """The newest of `context` within `limit` tokens; the oldest one kept may lose its beginning."""
    texts = _newest([line.text for line in context], limit, tokenizer)
    kept = context[len(context) - len(texts) :]
    return [Line(line.author, text) for line, text in zip(kept, texts, strict=True)]


def _newest(texts: Sequence[str], limit: int, tokenizer: ChatTokenizer) -> list[str]:
    kept: list[str] = []
    for text in reversed(texts):
        tokens = tokenizer.encode(text)
        if len(tokens) > limit:
            # A cut may fall inside a letter; what is left of it decodes to replacement marks.
            tail = tokenizer.decode(tokens[len(tokens) - limit :]).lstrip("\ufffd").lstrip() if limit else ""
            kept += [tail] if tail else []
            break
        kept.append(text)
        limit -= len(tokens)
    return kept[::-1]


def _framed(messages: Sequence[Message], before: str, tokenizer: ChatTokenizer) -> Framed:
    """Target: the last message but for the words `before`, to which it was merged."""
    rendered = tokenizer.render(messages, reply=False)
    start, stop = rendered.spans[-1]
    start += _common(tokenizer.encode(before), rendered.tokens[start:stop]) if before else 0
    return Framed(rendered.tokens[:stop], list(range(max(start, 1), stop)))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix: with more text behind it, the last token of a text may become another one."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    return count
