"""The instrument: does an adapter predict its person's next words better, and whose adapter is it?

Each history is cut into rounds. A round trains on what came before, as a run of the service does, from the version of
the round before; then it is tested on the newest messages, which no version has seen. All losses are those of the draft
frame, per token of the person's own words, each message under what stood before it. The rounds give a curve; the last
one is measured under every condition:

    base, prior         the bare base; an adapter of other people from which everybody started
    adapter, stale      the person's own; their own of the round before
    wrong_user          that of the next person in the list
    …_context           the same with quoted history in the prompt: of the kind that helps the bare base most
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jobs import answers, dataset, evaluate
from jobs.dataset import HeldOut
from jobs.people import Person, enrol
from jobs.plans import plan
from jobs.rehearsal import Rehearsal
from persona import frames, prompt
from persona.domain import ChatTokenizer, Entry, EntryId, Message, Role, UserId
from persona.engine import adapter_file
from persona.engine.faces import Engine
from persona.engine.protocol import AdapterRef, Progress, ScoreRequest, TrainRequest
from persona.errors import RequestError, TrainingFailed
from persona.settings import Settings
from storage.history import History
from storage.users import Users

CANDIDATES = 10  # messages of which one is the next
WINDOW = 400  # entries before a message that a quotation may reach back to
FOUND = 64  # entries looked at for a quotation by search, at least
ENTRY = 8  # tokens of the shortest entry as it is quoted, with its day
CURVE = ("base", "context", "prior", "wrong_user", "adapter", "adapter_context")  # measured after each round

Notify = Callable[[str, int, int], None]  # what is done, so many parts, of so many


@dataclass(frozen=True, slots=True)
class Context:
    """Quoted history of at most `tokens` tokens: the newest entries, or those that search finds."""

    kind: str  # recent or found
    tokens: int

    @property
    def name(self) -> str:
        return f"context_{self.kind}_{self.tokens}"


CONTEXTS = tuple(Context(kind, tokens) for tokens in (256, 1024) for kind in ("recent", "found"))


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    tokens: own tokens of each history that are used, the newest; None: all · rounds: how often each person learns ·
    probes: messages a person for the two recognition tests, 0: leave them out · questions: with known answers ·
    seed: of each training; how far results differ over several of them is chance.
    """

    tokens: int | None = None
    rounds: int = 3
    contexts: tuple[Context, ...] = CONTEXTS
    probes: int = 10
    questions: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or self.contexts[0].tokens != min(context.tokens for context in self.contexts):
            raise RequestError("Name at least one context, those with the fewest tokens first.")


@dataclass(frozen=True, slots=True)
class Stage:
    """A person after one round: what was trained, on how much, and what it is tested by."""

    adapter: AdapterRef
    own_tokens: int  # absorbed so far
    held_out: list[HeldOut]
    bytes: int
    seconds: float  # of this round's training


@dataclass(slots=True)
class Result:
    """One person, measured. `nats[condition]`: one value per held-out message, whose lengths are `lengths`."""

    name: str
    own_tokens: int
    lengths: list[int] = field(default_factory=list)
    nats: dict[str, list[float]] = field(default_factory=dict)
    chosen: str = ""  # the context that helps the bare base most, among the shortest
    curve: list[dict[str, float]] = field(default_factory=list)  # loss per condition after each round
    reference: dict[str, float] = field(default_factory=dict)  # loss on neutral answers
    replies: dict[str, float] = field(default_factory=dict)  # loss on what the bare base replies
    recognised: dict[str, float] = field(default_factory=dict)  # shares of probes
    answered: dict[str, float] = field(default_factory=dict)  # shares of questions
    bytes: int = 0
    seconds: float = 0.0

    def loss(self, condition: str) -> float:
        """Nats per token."""
        return float(np.sum(self.nats[condition]) / np.sum(self.lengths))


class Trial:
    """One experiment in an empty home with an engine of its own."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        history: History,
        engine: Engine,
        tokenizer: ChatTokenizer,
        rehearsal: Rehearsal,
        folder: Path,
        prior: AdapterRef | None = None,
        notify: Notify = lambda what, done, total: None,
    ) -> None:
        """folder: for the adapters · prior: from which everybody starts."""
        self._settings, self._users, self._history = settings, users, history
        self._engine, self._tokenizer, self._folder, self._prior = engine, tokenizer, folder, prior
        self._rehearsal = rehearsal
        self._notify = notify

    async def run(
        self, people: Sequence[Person], options: Options, told: Callable[[Result], None] = lambda result: None
    ) -> list[Result]:
        """One person after another learns and is measured; then all are recognised and asked.

        told: gets each person as soon as they are measured. Raises RequestError for a history that is too short and
        for a context that is too long, before anybody learns.
        """
        pupils = [await self._enrol(number, person, options) for number, person in enumerate(people)]
        lessons = [await self._lessons(pupil, options.rounds) for pupil in pupils]
        self._demand_room([one for mine in lessons for lesson in mine for one in lesson.data.held_out], options)
        stages: list[list[Stage]] = []
        results: list[Result] = []
        for place, pupil in enumerate(pupils):
            other = (place + 1) % len(pupils)
            while len(stages) <= max(place, other):
                stages.append(await self._learn(pupils[len(stages)], lessons[len(stages)], options.seed))
            self._notify(f"measuring {pupil.name}", place, len(pupils))
            wrong = stages[other] if other != place else None
            results.append(await self._measure(pupil, stages[place], wrong, options))
            told(results[-1])
        if options.probes:
            await self._recognise(pupils, [mine[-1] for mine in stages], results, options.probes)
        if options.questions:
            await self._question(stages, results, options.questions)
        return results

    # --- learning

    async def _enrol(self, number: int, person: Person, options: Options) -> "_Pupil":
        """The person as a user with the newest part of their history."""
        user_id, entries = await enrol(person, number, self._users, self._history, self._count)
        first = 0
        if options.tokens is not None:
            room = options.tokens
            for start in range(len(entries) - 1, -1, -1):
                room -= self._count(dataset.own_words(entries[start].text)) if entries[start].role is Role.USER else 0
                if room < 0:
                    first = start + 1
                    break
        return _Pupil(person.name, user_id, entries[first:], frozenset(entry.id for entry in entries[:first]))

    async def _lessons(self, pupil: "_Pupil", rounds: int) -> list["_Lesson"]:
        """What each round may see and trains on, as a run of the service would."""
        lessons: list[_Lesson] = []
        watermark = EntryId(0)
        for number in range(1, rounds + 1):
            seen = pupil.entries[: len(pupil.entries) * number // rounds]
            data = await asyncio.to_thread(
                dataset.build,
                [entry for entry in seen if entry.id > watermark],
                replay=[entry for entry in seen if entry.id <= watermark],
                seen=watermark,
                tokenizer=self._tokenizer,
                settings=self._settings.learning,
                system=self._settings.prompt.system,
                longest=self._settings.engine.context,
            )
            if isinstance(data, dataset.Deferred):
                raise RequestError(f"The history of {pupil.name} is too short for this trial. {data.reason}")
            lessons.append(_Lesson(data, len(seen)))
            watermark = data.watermark
        return lessons

    def _demand_room(self, messages: Sequence[HeldOut], options: Options) -> None:
        """Any of the messages after any quotation is read whole: of one that was cut, fewer words would count.

        Raises RequestError.
        """
        framed = [self.draft(message, "") for message in messages]
        bare = max(one.targets[0] for one in framed) + max(len(one.targets) for one in framed)
        quoted, longest = max(context.tokens for context in options.contexts), self._settings.engine.context
        if (wanted := bare + quoted + prompt.SEAM_TOKENS) > longest:
            raise RequestError(
                f"A prompt that quotes {quoted} tokens may have {wanted} here, and engine.context is {longest}:"
                " raise it, or measure with shorter contexts (--contexts)."
            )

    async def _learn(self, pupil: "_Pupil", lessons: Sequence["_Lesson"], seed: int) -> list[Stage]:
        """Each round from the version of the round before, the first from the prior."""
        stages: list[Stage] = []
        for number, lesson in enumerate(lessons, 1):
            doing = f"{pupil.name} learns, round {number} of {len(lessons)}"
            self._notify(doing, 0, 1)
            data, start = lesson.data, stages[-1].adapter if stages else self._prior
            out = self._folder / f"{pupil.user_id}-{lesson.entries}"
            out.mkdir(parents=True)
            own = [sample.example for sample in data.examples]
            wanted = plan(self._settings.learning, data.passes, start, own, seed=seed)
            rehearsed = await self._rehearsal.examples(own, data.watermark)
            last = await self._train(TrainRequest([*own, *rehearsed], wanted, str(out), start), doing)
            made = out / adapter_file.FILE
            digest = hashlib.sha256(made.read_bytes()).hexdigest()
            ref = AdapterRef(pupil.user_id, lesson.entries, str(out), digest)
            absorbed = (stages[-1].own_tokens if stages else 0) + data.new_tokens
            stages.append(Stage(ref, absorbed, data.held_out, made.stat().st_size, last.seconds))
        return stages

    async def _train(self, request: TrainRequest, doing: str) -> Progress:
        last: Progress | None = None
        async for progress in self._engine.train(request):
            self._notify(doing, progress.step, progress.steps)
            last = progress
        if last is not None and last.done:
            return last
        raise TrainingFailed("The engine ended the training without a result.")

    # --- measuring

    async def _measure(
        self, pupil: "_Pupil", stages: list[Stage], wrong: list[Stage] | None, options: Options
    ) -> Result:
        """wrong: the rounds of another person."""
        last, short = stages[-1], options.contexts[0].tokens
        result = Result(pupil.name, last.own_tokens, bytes=last.bytes, seconds=sum(s.seconds for s in stages))
        measure = _Measure(self, pupil, last.held_out, result)
        await measure("base", None)
        for context in options.contexts:
            await measure(context.name, None, context)
        shortest = [context for context in options.contexts if context.tokens == short]
        chosen = min(shortest, key=lambda context: result.loss(context.name))
        result.chosen, result.nats["context"] = chosen.name, result.nats[chosen.name]
        sides = {"adapter": last.adapter, "prior": self._prior, "wrong_user": wrong[-1].adapter if wrong else None}
        sides["stale"] = stages[-2].adapter if len(stages) > 1 else None
        for name, adapter in sides.items():
            if adapter is not None:
                await measure(name, adapter)
                await measure(f"{name}_context", adapter, chosen)
        for number, stage in enumerate(stages[:-1]):
            other = wrong[number].adapter if wrong else None
            result.curve.append(_point(await self._then(pupil, stage, other, chosen)))
        result.curve.append(_point(result))
        for name, adapter in (("base", None), ("adapter", last.adapter)):
            result.reference[name] = await self._reference(adapter)
            result.replies[name] = await self._replies(adapter)
        return result

    async def _then(self, pupil: "_Pupil", stage: Stage, wrong: AdapterRef | None, context: Context) -> Result:
        """What the curve shows of an earlier round, on the messages that came next then."""
        then = Result(pupil.name, stage.own_tokens)
        measure = _Measure(self, pupil, stage.held_out, then)
        await measure("base", None)
        await measure("context", None, context)
        for name, adapter in (("prior", self._prior), ("wrong_user", wrong), ("adapter", stage.adapter)):
            if adapter is not None:
                await measure(name, adapter)
        await measure("adapter_context", stage.adapter, context)
        return then

    async def scored(self, framed: Sequence[frames.Framed], adapter: AdapterRef | None) -> list[list[float]]:
        """Log-probabilities of the targets of each."""
        return await self._engine.score_all([ScoreRequest(one.tokens, one.targets, adapter) for one in framed])

    async def quoted(self, pupil: "_Pupil", message: HeldOut, context: Context | None) -> str:
        """History that stood before `message`, as a prompt quotes it."""
        if context is None:
            return ""
        if context.kind == "recent":
            lately = [e for e in pupil.before(message) if e.id not in message.conversation][-WINDOW:]
            return prompt.quote_recent(dataset.redacted(lately), self._tokenizer, context.tokens).text
        said = "\n".join(line.text for line in message.lines) or pupil.before(message)[-1].text
        left = message.conversation | pupil.unused
        most = max(FOUND, context.tokens // ENTRY)
        found = await self._history.search(pupil.user_id, said, limit=most, before=message.entry_id, exclude=left)
        return prompt.quote_found(dataset.redacted(found), self._tokenizer, context.tokens).text

    def draft(self, message: HeldOut, quoted: str, text: str | None = None) -> frames.Framed:
        """The message, or `text` in its place, as a draft after what was said before it."""
        lines = frames.trim_lines(message.lines, self._settings.learning.context_tokens, self._tokenizer)
        framed = frames.draft(lines, message.text if text is None else text, quoted=quoted, tokenizer=self._tokenizer)
        return framed.clipped(targets=dataset.TARGET_TOKENS, tokens=len(framed.tokens))

    async def _reference(self, adapter: AdapterRef | None) -> float:
        """Loss per token on the answers that an assistant must not unlearn."""
        system = Message(Role.SYSTEM, self._settings.prompt.system)
        framed = [
            frames.reply([system, Message(Role.USER, ask)], answer, tokenizer=self._tokenizer)
            for ask, answer in evaluate.reference()
        ]
        return _per_token(await self.scored(framed, adapter))

    async def _replies(self, adapter: AdapterRef | None) -> float:
        """Loss per token on the bare base's own replies to the same questions."""
        framed = await self._rehearsal.replies([ask for ask, _ in evaluate.reference()])
        return _per_token(await self.scored(framed, adapter))

    # --- recognising

    async def _recognise(
        self, pupils: Sequence["_Pupil"], last: Sequence[Stage], results: Sequence[Result], probes: int
    ) -> None:
        """Whether the adapter finds the next message among others', and whether a message finds its adapter."""
        pool = [(place, message) for place, stage in enumerate(last) for message in stage.held_out]
        for place, (pupil, stage, result) in enumerate(zip(pupils, last, results, strict=True)):
            self._notify(f"recognising {pupil.name}", place, len(pupils))
            some = stage.held_out[-probes:]
            others = [message for owner, message in pool if owner != place]
            if len(others) >= CANDIDATES - 1:
                for name, adapter in (("base", None), ("adapter", stage.adapter)):
                    hits = [await self._next_among(message, others, adapter) for message in some]
                    result.recognised[f"next_of_{CANDIDATES}_{name}"] = sum(hits) / len(hits)
            if len(last) > 1:
                table = np.array([await self._nats(some, other.adapter) for other in last])  # [people, messages]
                result.recognised["author"] = float((table.argmin(0) == place).mean())
                result.recognised["author_together"] = float(table.sum(1).argmin() == place)

    async def _next_among(self, message: HeldOut, others: Sequence[HeldOut], adapter: AdapterRef | None) -> bool:
        """Whether the likeliest per token is the true one, among those of other people with the nearest lengths."""
        near = sorted(others, key=lambda other: (abs(other.tokens - message.tokens), other.entry_id))
        texts = [message.text, *(other.text for other in near[: CANDIDATES - 1])]
        found = await self.scored([self.draft(message, "", text) for text in texts], adapter)
        means = [sum(values) / len(values) for values in found]
        return max(range(len(means)), key=means.__getitem__) == 0

    async def _nats(self, messages: Sequence[HeldOut], adapter: AdapterRef) -> list[float]:
        found = await self.scored([self.draft(message, "") for message in messages], adapter)
        return [-sum(values) for values in found]

    async def _question(self, stages: Sequence[list[Stage]], results: Sequence[Result], limit: int) -> None:
        """Whether the assistant still knows what it knew."""
        bare = await answers.answered(self._engine, self._tokenizer, None, self._settings, limit)
        for place, (mine, result) in enumerate(zip(stages, results, strict=True)):
            self._notify(f"asking beside {result.name}", place, len(results))
            own = await answers.answered(self._engine, self._tokenizer, mine[-1].adapter, self._settings, limit)
            result.answered = {"base": sum(bare) / len(bare), "adapter": sum(own) / len(own)}

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))


def _point(result: Result) -> dict[str, float]:
    """Of the curve: losses by the own tokens learned from."""
    return {"tokens": result.own_tokens, **{name: result.loss(name) for name in CURVE if name in result.nats}}


def _per_token(logprobs: Sequence[Sequence[float]]) -> float:
    """Nats per token of all together."""
    return -sum(map(sum, logprobs)) / sum(map(len, logprobs))


@dataclass(frozen=True, slots=True)
class _Pupil:
    """A person in the trial: entries in order, and those before them, which the trial leaves out."""

    name: str
    user_id: UserId
    entries: list[Entry]
    unused: frozenset[EntryId]

    def before(self, message: HeldOut) -> list[Entry]:
        return [entry for entry in self.entries if entry.id < message.entry_id]


@dataclass(frozen=True, slots=True)
class _Lesson:
    """The examples and held-out messages of one round, made of the first `entries` entries."""

    data: dataset.Dataset
    entries: int


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures one person's messages under one condition after another."""

    trial: Trial
    pupil: _Pupil
    messages: Sequence[HeldOut]
    result: Result

    async def __call__(self, name: str, adapter: AdapterRef | None, context: Context | None = None) -> None:
        quoted = [await self.trial.quoted(self.pupil, message, context) for message in self.messages]
        framed = [self.trial.draft(message, text) for message, text in zip(self.messages, quoted, strict=True)]
        lengths = [len(one.targets) for one in framed]
        self.result.lengths = self.result.lengths or lengths
        assert lengths == self.result.lengths, "the same words count under every condition"
        found = await self.trial.scored(framed, adapter)
        self.result.nats[name] = [-sum(values) for values in found]
