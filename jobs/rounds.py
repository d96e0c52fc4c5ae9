"""How the people of a trial learn: each history is cut into rounds, and a round is what a run of the service would be.

It trains on what came before it and was not absorbed yet, from the version of the round before. What the assistant pays
for that is judged as the gate judges it (evaluate.Cost.objection): where it is too much, half of the way there is
judged, and where that is too much as well, what was there stays and the next round learns both. Before the first round
that is the prior, if the gate lets it serve. The gate's other half, whether the person is predicted better, is left
out, as it looks at the messages that the trial measures by. By the half that is judged the trial measures, too: behind
the gate, what an adapter costs the assistant is a bound that is kept, and no finding.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from jobs import dataset
from jobs.dataset import HeldOut
from jobs.evaluate import Assistant, Scorer
from jobs.people import Person, enrol
from jobs.plans import plan
from jobs.rehearsal import Rehearsal
from persona.domain import ChatTokenizer, Entry, EntryId, Role, UserId
from persona.engine import adapter_file
from persona.engine.faces import Engine
from persona.engine.protocol import AdapterRef, Progress, TrainRequest
from persona.errors import RequestError, TrainingFailed
from persona.settings import Settings
from storage.history import History
from storage.users import Users

Notify = Callable[[str, int, int], None]  # what is done, so many parts, of so many


@dataclass(frozen=True, slots=True)
class Pupil:
    """A person in the trial: entries in order, and those before them, which the trial leaves out."""

    name: str
    user_id: UserId
    entries: list[Entry]
    unused: frozenset[EntryId]

    def before(self, message: HeldOut) -> list[Entry]:
        return [entry for entry in self.entries if entry.id < message.entry_id]


@dataclass(frozen=True, slots=True)
class Lesson:
    """The examples and held-out messages of one round, made of the first `entries` entries."""

    data: dataset.Dataset
    entries: int


class Kept(StrEnum):
    """What came of a round."""

    WHOLE = "whole"
    HALF = "half"  # of the way from where the training began
    NOTHING = "nothing"  # what was there stays


@dataclass(frozen=True, slots=True)
class Stage:
    """A person after one round: what serves them, made of how much, and what it is tested by."""

    adapter: AdapterRef | None  # None: the bare base
    own_tokens: int  # absorbed so far
    watermark: EntryId
    held_out: list[HeldOut]
    bytes: int
    seconds: float  # of this round's training
    kept: Kept

    @property
    def own(self) -> bool:
        """Whether something of this person serves: else it is the prior or the bare base."""
        return self.own_tokens > 0


@dataclass(frozen=True, slots=True)
class Ground:
    """What a trial stands on: an empty home with an engine of its own.

    folder: for the adapters · prior: from which everybody starts.
    """

    settings: Settings
    users: Users
    history: History
    engine: Engine
    tokenizer: ChatTokenizer
    rehearsal: Rehearsal
    folder: Path
    prior: AdapterRef | None = None
    notify: Notify = lambda what, done, total: None

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))


class Rounds:
    """The learning half of a trial."""

    def __init__(self, ground: Ground) -> None:
        self._ground, settings = ground, ground.settings
        self._scorer = Scorer(ground.engine, ground.tokenizer, (), (), settings, settings.engine.context)
        self._known: dict[AdapterRef | None, Assistant] = {}

    async def enrol(self, number: int, person: Person, tokens: int | None) -> Pupil:
        """The person as a user with the newest part of their history, of so many own tokens; None: with all of it."""
        ground = self._ground
        user_id, entries = await enrol(person, number, ground.users, ground.history, ground.count)
        first = 0
        if tokens is not None:
            room = tokens
            for start in range(len(entries) - 1, -1, -1):
                room -= ground.count(dataset.own_words(entries[start].text)) if entries[start].role is Role.USER else 0
                if room < 0:
                    first = start + 1
                    break
        return Pupil(person.name, user_id, entries[first:], frozenset(entry.id for entry in entries[:first]))

    async def lessons(self, pupil: Pupil, rounds: int) -> list[Lesson]:
        """What each round may see and trains on if every round is kept. Raises RequestError for too short a history."""
        lessons: list[Lesson] = []
        watermark = EntryId(0)
        for number in range(1, rounds + 1):
            lesson = await self._lesson(pupil, len(pupil.entries) * number // rounds, watermark)
            lessons.append(lesson)
            watermark = lesson.data.watermark
        return lessons

    async def _lesson(self, pupil: Pupil, entries: int, watermark: EntryId) -> Lesson:
        """On the first `entries`, of which those up to `watermark` are absorbed."""
        seen = pupil.entries[:entries]
        data = await asyncio.to_thread(
            dataset.build,
            [entry for entry in seen if entry.id > watermark],
            replay=[entry for entry in seen if entry.id <= watermark],
            seen=watermark,
            tokenizer=self._ground.tokenizer,
            settings=self._ground.settings.learning,
            system=self._ground.settings.prompt.system,
            longest=self._ground.settings.engine.context,
        )
        if isinstance(data, dataset.Deferred):
            raise RequestError(f"The history of {pupil.name} is too short for this trial. {data.reason}")
        return Lesson(data, entries)

    async def learn(self, pupil: Pupil, lessons: Sequence[Lesson], *, seed: int, gate: bool) -> list[Stage]:
        """Each round from what the round before left, the first from the prior.

        gate: judge what the assistant pays; else whatever was trained is kept.
        """
        serves = self._ground.prior
        if serves is not None and gate and await self._objection(serves):
            serves = None
        stages = [Stage(serves, 0, EntryId(0), [], 0, 0.0, Kept.NOTHING)]
        for number, planned in enumerate(lessons, 1):
            doing = f"{pupil.name} learns, round {number} of {len(lessons)}"
            self._ground.notify(doing, 0, 1)
            lesson = planned
            if number > 1 and stages[-1].kept is Kept.NOTHING:
                lesson = await self._lesson(pupil, planned.entries, stages[-1].watermark)
            stages.append(await self._round(pupil, stages[-1], lesson, doing, seed=seed, gate=gate))
        return stages[1:]

    async def _round(self, pupil: Pupil, last: Stage, lesson: Lesson, doing: str, *, seed: int, gate: bool) -> Stage:
        data = lesson.data
        folders = [self._ground.folder / f"{pupil.user_id}-{lesson.entries}-{way}" for way in (Kept.WHOLE, Kept.HALF)]
        for folder in folders:
            folder.mkdir(parents=True)
        own = [sample.example for sample in data.examples]
        start = last.adapter or self._ground.prior
        wanted = plan(self._ground.settings.learning, data.passes, start, own, seed=seed)
        # Drawn by what stays the same whoever else is in the trial.
        rehearsed = await self._ground.rehearsal.examples(own, lesson.entries + seed)
        whole, half = map(str, folders)
        done = await self._train(TrainRequest([*own, *rehearsed], wanted, whole, start, half=half), doing)
        for way, (folder, kept) in enumerate(zip(folders, (Kept.WHOLE, Kept.HALF), strict=True)):
            made = folder / adapter_file.FILE
            digest = hashlib.sha256(made.read_bytes()).hexdigest()
            adapter = AdapterRef(pupil.user_id, 2 * lesson.entries + way, str(folder), digest)
            if not gate or await self._objection(adapter) is None:
                absorbed = last.own_tokens + data.new_tokens
                size = made.stat().st_size
                return Stage(adapter, absorbed, data.watermark, data.held_out, size, done.seconds, kept)
        absorbed, size = last.own_tokens, last.bytes
        return Stage(last.adapter, absorbed, last.watermark, data.held_out, size, done.seconds, Kept.NOTHING)

    async def _train(self, request: TrainRequest, doing: str) -> Progress:
        last: Progress | None = None
        async for progress in self._ground.engine.train(request):
            self._ground.notify(doing, progress.step, progress.steps)
            last = progress
        if last is not None and last.done:
            return last
        raise TrainingFailed("The engine ended the training without a result.")

    async def assistant(self, adapter: AdapterRef | None) -> Assistant:
        """Scored once for each adapter, and once for the bare base."""
        if adapter not in self._known:
            self._known[adapter] = await self._scorer.assistant(adapter, self._ground.rehearsal)
        return self._known[adapter]

    async def _objection(self, adapter: AdapterRef) -> str | None:
        """Why the gate would not let it serve, whomever it predicts."""
        bare = await self.assistant(None)
        return bare.cost(await self.assistant(adapter)).objection(self._ground.settings)
