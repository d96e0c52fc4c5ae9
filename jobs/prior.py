"""The prior: an adapter of several people's words, from which each user starts in place of the bare base.

What people who write in a like way have in common is learned once, from those who agreed to it or from public text, and
a user's own adapter has only the rest to learn. It is an ordinary adapter of the plan's form: a run starts from its
values as it would from the user's last version. Beside it lies by whom it was made, in salted hashes: it must not
be tested on them.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from jobs import dataset
from jobs.people import Person
from jobs.plans import plan
from jobs.rehearsal import Rehearsal
from persona.domain import ChatTokenizer, Entry, Role
from persona.engine.faces import Training
from persona.engine.protocol import Example, Progress, TrainRequest
from persona.errors import ConfigurationError, RequestError
from persona.settings import Settings

SEED = 20_265
PASSES = 2  # of several people, who between them say little twice
MADE_BY = "people.json"
_LONG = 20  # characters; shorter messages are anybody's
_SHARED = 0.05  # of somebody's long messages; chats of different people have less than 0.003 in common


def examples(
    histories: Sequence[Sequence[Entry]], *, tokenizer: ChatTokenizer, settings: Settings, tokens: int
) -> list[Example]:
    """Of each history an equal share of `tokens` (context included), its newest words. Raises RequestError for none."""
    share = settings.learning.model_copy(update={"max_run_tokens": max(1000, tokens // max(1, len(histories)))})
    found = [
        sample.example
        for entries in histories
        for sample in dataset.everything(
            entries,
            tokenizer=tokenizer,
            settings=share,
            system=settings.prompt.system,
            longest=settings.engine.context,
        )
    ]
    if not found:
        raise RequestError("None of these histories holds words to learn from.")
    return [found[i] for i in np.random.default_rng(SEED).permutation(len(found))]


async def train(
    engine: Training, rehearsal: Rehearsal, some: list[Example], settings: Settings, out: Path
) -> AsyncIterator[Progress]:
    """Write adapter.safetensors into the folder `out`; the base's own replies are rehearsed as in a user's run."""
    rehearsed = await rehearsal.examples(some, SEED)
    wanted = plan(settings.learning.model_copy(update={"max_run_tokens": 0}), PASSES)
    async for progress in engine.train(TrainRequest([*some, *rehearsed], wanted, str(out))):
        yield progress


class MadeBy(msgspec.Struct, frozen=True):
    """The file beside a prior: salted hashes of the names and the long messages of those it learned from."""

    salt: str
    names: frozenset[str]
    messages: frozenset[str]

    def among(self, some: Iterable[Person]) -> list[str]:
        """Who of these people is one of them, by their name or by what they wrote."""
        return [one.name for one in some if self._hash(one.name) in self.names or self._wrote(one)]

    def _wrote(self, person: Person) -> bool:
        long = _long(person)
        return sum(self._hash(text) in self.messages for text in long) > _SHARED * len(long)

    def _hash(self, text: str) -> str:
        return _hash(self.salt, text)


def write_people(folder: Path, some: Iterable[Person], salt: str) -> None:
    """Who made the prior in `folder`."""
    people = list(some)
    names = frozenset(_hash(salt, one.name) for one in people)
    messages = frozenset(_hash(salt, text) for one in people for text in _long(one))
    (folder / MADE_BY).write_bytes(msgspec.json.encode(MadeBy(salt, names, messages), order="deterministic"))


def read_people(folder: Path) -> MadeBy | None:
    """Who made the prior in `folder`; None if that is not told. Raises ConfigurationError if it cannot be read."""
    file = folder / MADE_BY
    try:
        return msgspec.json.decode(file.read_bytes(), type=MadeBy)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        raise ConfigurationError(f"{file} cannot be read: copy it anew from where the prior was trained.") from None


def _long(person: Person) -> list[str]:
    """Their own messages that tell people apart, spaces made one."""
    own = (" ".join(item.text.split()) for item in person.items if item.role is Role.USER)
    return [text for text in own if len(text) >= _LONG]


def _hash(salt: str, text: str) -> str:
    """6 bytes: among a million messages one in 300 million others would seem to be there."""
    return hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
