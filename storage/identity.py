"""How a turn is recognised when a client sends it again: a hash chain over (role, text), salted per user.

Two turns are the same if they and everything before them are the same. System and tool messages are no turns;
thoughts in <think> tags and white space at the ends belong to no turn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from persona.domain import Message, Role
from storage.normal import normal

_OPEN, _CLOSE = "<think>", "</think>"
_TURNS = (Role.USER, Role.ASSISTANT)


@dataclass(frozen=True, slots=True)
class Turn:
    """A message as history keeps it."""

    role: Role
    text: str
    digest: bytes  # of role and text


def printable(text: str) -> str:
    """`text` without NUL and lone surrogates, which the database cannot hold."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def clean(role: Role, text: str) -> str:
    """`text` without thoughts; an assistant's thought may lack its first or its last tag."""
    text = _without_thoughts(printable(text))
    if role == Role.ASSISTANT:
        text = text.rpartition(_CLOSE)[2].partition(_OPEN)[0]
    return text.strip()


def _without_thoughts(text: str) -> str:
    """In time linear in the text, whatever tags stand in it."""
    kept, at = [], 0
    while (start := text.find(_OPEN, at)) >= 0 and (end := text.find(_CLOSE, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(_CLOSE)
    return "".join(kept) + text[at:]


def turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns among `messages`: what is said by user and assistant, and is not empty."""
    said = ((message.role, clean(message.role, message.text)) for message in messages if message.role in _TURNS)
    return [Turn(role, text, digest(role, text)) for role, text in said if text]


def digest(role: Role, text: str) -> bytes:
    """Hash of one turn alone. Line ends and the composition of accents make no difference."""
    plain = normal("NFC", text.replace("\r\n", "\n"))
    return hashlib.sha256(f"{role}\0{plain}".encode()).digest()


def seed(salt: bytes, conversation: str | None) -> bytes:
    """Where a user's chain begins: in one place, or in a place of its own for a conversation that the client names."""
    return hashlib.sha256(salt + printable(conversation or "").encode()).digest()


def link(chain: bytes, turn: bytes) -> bytes:
    """The chain after one more turn digest."""
    return hashlib.sha256(chain + turn).digest()


def links(chain: bytes, follow: Sequence[Turn]) -> list[bytes]:
    """The chain after each of the turns that `follow`."""
    result = []
    for turn in follow:
        chain = link(chain, turn.digest)
        result.append(chain)
    return result


def name(chain: bytes) -> str:
    """The id of the conversation whose first own turn has this chain."""
    return f"c-{chain[:12].hex()}"
