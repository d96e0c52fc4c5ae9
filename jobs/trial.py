"""The instrument: does an adapter predict its person's next words better, and whose adapter is it?

Each history is cut into rounds (jobs/rounds.py). A round trains on what came before; then it is tested on the newest
messages, which no version has seen. All losses are those of the draft frame, per token of the person's own words, each
message under what stood before it. The rounds give a curve; the last one is measured under every condition:

    base, prior         the bare base; an adapter of other people from which everybody started
    adapter, stale      what serves after the last round, and after the one before: the person's own, if one was kept
    wrong_user          that of the next person in the list who has one
    …_context           the same with quoted history in the prompt: of the kind that helps the bare base most
    …_served            base, adapter and stale as `me` is served: with the newest entries that the version has not
                        absorbed, as many as the service quotes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs import answers, dataset
from jobs.dataset import HeldOut
from jobs.people import Person
from jobs.rounds import Ground, Pupil, Rounds, Stage
from persona import frames, prompt
from persona.domain import EntryId
from persona.engine.protocol import AdapterRef, ScoreRequest
from persona.errors import RequestError

CANDIDATES = 10  # messages of which one is the next
NOTHING = EntryId(0)  # a watermark: no entry was absorbed
WINDOW = 400  # entries before a message that a quotation may reach back to
FOUND = 64  # entries looked at for a quotation by search, at least
ENTRY = 8  # tokens of the shortest entry as it is quoted, with its day
CURVE = ("base", "context", "prior", "wrong_user", "adapter", "adapter_context")  # measured after each round


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
    seed: of each training; how far results differ over several of them is chance · gate: what costs the assistant too
    much is kept by half, or not at all, as by the service; without, whatever was trained is measured.
    """

    tokens: int | None = None
    rounds: int = 3
    contexts: tuple[Context, ...] = CONTEXTS
    probes: int = 10
    questions: int = 0
    seed: int = 0
    gate: bool = True

    def __post_init__(self) -> None:
        if not self.contexts or self.contexts[0].tokens != min(context.tokens for context in self.contexts):
            raise RequestError("Name at least one context, those with the fewest tokens first.")


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
    kept: list[str] = field(default_factory=list)  # what came of each round: rounds.Kept

    def loss(self, condition: str) -> float:
        """Nats per token."""
        return float(np.sum(self.nats[condition]) / np.sum(self.lengths))


class Trial:
    """One experiment in an empty home with an engine of its own."""

    def __init__(self, ground: Ground) -> None:
        self._ground, self._rounds = ground, Rounds(ground)

    async def run(
        self, people: Sequence[Person], options: Options, told: Callable[[Result], None] = lambda result: None
    ) -> list[Result]:
        """One person after another learns and is measured; then all are recognised and asked.

        told: gets each person as soon as they are measured. Raises RequestError for a history that is too short and
        for a context that is too long, before anybody learns.
        """
        rounds = self._rounds
        pupils = [await rounds.enrol(number, person, options.tokens) for number, person in enumerate(people)]
        lessons = [await rounds.lessons(pupil, options.rounds) for pupil in pupils]
        self._demand_room([one for mine in lessons for lesson in mine for one in lesson.data.held_out], options)
        stages: list[list[Stage]] = []
        results: list[Result] = []

        async def learned(place: int) -> list[Stage]:
            while len(stages) <= place:
                who, what = pupils[len(stages)], lessons[len(stages)]
                stages.append(await rounds.learn(who, what, seed=options.seed, gate=options.gate))
            return stages[place]

        for place, pupil in enumerate(pupils):
            mine, wrong = await learned(place), None
            for step in range(1, len(pupils)):
                if (other := await learned((place + step) % len(pupils)))[-1].own:
                    wrong = other
                    break
            self._ground.notify(f"measuring {pupil.name}", place, len(pupils))
            results.append(await self._measure(pupil, mine, wrong, options))
            told(results[-1])
        if options.probes:
            await self._recognise(pupils, [mine[-1] for mine in stages], results, options.probes)
        if options.questions:
            await self._question(stages, results, options.questions)
        return results

    # --- measuring

    def _demand_room(self, messages: Sequence[HeldOut], options: Options) -> None:
        """Any of the messages after any quotation is read whole: of one that was cut, fewer words would count.

        Raises RequestError.
        """
        bare, longest = self._bare(messages), self._ground.settings.engine.context
        quoted = max(context.tokens for context in options.contexts)
        if (wanted := bare + quoted + prompt.SEAM_TOKENS) > longest:
            raise RequestError(
                f"A prompt that quotes {quoted} tokens may have {wanted} here, and engine.context is {longest}:"
                " raise it, or measure with shorter contexts (--contexts)."
            )

    def _bare(self, messages: Sequence[HeldOut]) -> int:
        """Tokens that a prompt of any of the messages has at most, without a quotation."""
        framed = [self.draft(message, "") for message in messages]
        return max(one.targets[0] for one in framed) + max(len(one.targets) for one in framed)

    def _served(self, messages: Sequence[HeldOut]) -> Context:
        """What `me` quotes: as much as the service would (prompt.py), and of that what a version has not absorbed."""
        settings = self._ground.settings
        room = (settings.engine.context - self._bare(messages)) * 2 // 3 - prompt.SEAM_TOKENS
        return Context("recent", min(settings.prompt.recent_tokens, room))

    async def _measure(self, pupil: Pupil, stages: list[Stage], wrong: list[Stage] | None, options: Options) -> Result:
        """wrong: the rounds of another person."""
        last, short = stages[-1], options.contexts[0].tokens
        result = Result(pupil.name, last.own_tokens, bytes=last.bytes, seconds=sum(s.seconds for s in stages))
        result.kept = [stage.kept.value for stage in stages]
        measure = _Measure(self, pupil, last.held_out, result)
        await measure("base", None)
        for context in options.contexts:
            await measure(context.name, None, context)
        shortest = [context for context in options.contexts if context.tokens == short]
        chosen = min(shortest, key=lambda context: result.loss(context.name))
        result.chosen, result.nats["context"] = chosen.name, result.nats[chosen.name]
        sides = self._sides(last, wrong[-1] if wrong else None)
        if len(stages) > 1:
            sides["stale"] = stages[-2].adapter
        for name, adapter in sides.items():
            await measure(name, adapter)
            await measure(f"{name}_context", adapter, chosen)
        served, absorbed = self._served(last.held_out), {"base": NOTHING, "adapter": last.watermark}
        if len(stages) > 1:
            absorbed["stale"] = stages[-2].watermark
        for name, watermark in absorbed.items():
            await measure(f"{name}_served", sides.get(name), served, watermark)
        for number, stage in enumerate(stages[:-1]):
            other = wrong[number] if wrong else None
            result.curve.append(_point(await self._then(pupil, stage, other, chosen)))
        result.curve.append(_point(result))
        for name, adapter in (("base", None), ("adapter", last.adapter)):
            said = await self._rounds.assistant(adapter)
            result.reference[name], result.replies[name] = said.reference, said.replies
        return result

    def _sides(self, own: Stage, wrong: Stage | None) -> dict[str, AdapterRef | None]:
        """Who serves after one round, by condition; None is the bare base, where nothing was kept."""
        sides = {"adapter": own.adapter}
        if self._ground.prior is not None:
            sides["prior"] = self._ground.prior
        if wrong is not None and wrong.own:
            sides["wrong_user"] = wrong.adapter
        return sides

    async def _then(self, pupil: Pupil, stage: Stage, wrong: Stage | None, context: Context) -> Result:
        """What the curve shows of an earlier round, on the messages that came next then."""
        then = Result(pupil.name, stage.own_tokens)
        measure = _Measure(self, pupil, stage.held_out, then)
        await measure("base", None)
        await measure("context", None, context)
        for name, adapter in self._sides(stage, wrong).items():
            await measure(name, adapter)
        await measure("adapter_context", stage.adapter, context)
        return then

    async def scored(self, framed: Sequence[frames.Framed], adapter: AdapterRef | None) -> list[list[float]]:
        """Log-probabilities of the targets of each."""
        return await self._ground.engine.score_all([ScoreRequest(one.tokens, one.targets, adapter) for one in framed])

    async def quoted(
        self, pupil: Pupil, message: HeldOut, context: Context | None, watermark: EntryId = NOTHING
    ) -> str:
        """History that stood before `message`, as a prompt quotes it: of the newest, only what is after `watermark`."""
        if context is None:
            return ""
        if context.kind == "recent":
            before = [entry for entry in pupil.before(message) if entry.id > watermark]
            lately = [entry for entry in before if entry.id not in message.conversation][-WINDOW:]
            return prompt.quote_recent(dataset.redacted(lately), self._ground.tokenizer, context.tokens).text
        said = "\n".join(line.text for line in message.lines) or pupil.before(message)[-1].text
        left = message.conversation | pupil.unused
        most, search = max(FOUND, context.tokens // ENTRY), self._ground.history.search
        found = await search(pupil.user_id, said, limit=most, before=message.entry_id, exclude=left)
        return prompt.quote_found(dataset.redacted(found), self._ground.tokenizer, context.tokens).text

    def draft(self, message: HeldOut, quoted: str, text: str | None = None) -> frames.Framed:
        """The message, or `text` in its place, as a draft after what was said before it."""
        tokenizer, text = self._ground.tokenizer, message.text if text is None else text
        lines = frames.trim_lines(message.lines, self._ground.settings.learning.context_tokens, tokenizer)
        framed = frames.draft(lines, text, quoted=quoted, tokenizer=tokenizer)
        return framed.clipped(targets=dataset.TARGET_TOKENS, tokens=len(framed.tokens))

    # --- recognising

    async def _recognise(
        self, pupils: Sequence[Pupil], last: Sequence[Stage], results: Sequence[Result], probes: int
    ) -> None:
        """Whether the adapter finds the next message among others', and whether a message finds its adapter."""
        pool = [(place, message) for place, stage in enumerate(last) for message in stage.held_out]
        for place, (pupil, stage, result) in enumerate(zip(pupils, last, results, strict=True)):
            self._ground.notify(f"recognising {pupil.name}", place, len(pupils))
            some = stage.held_out[-probes:]
            others = [message for owner, message in pool if owner != place]
            if len(others) >= CANDIDATES - 1:
                for name, adapter in (("base", None), ("adapter", stage.adapter)):
                    tried = [await self._next_among(message, others, adapter) for message in some]
                    if hits := [hit for hit in tried if hit is not None]:
                        result.recognised[f"next_of_{CANDIDATES}_{name}"] = sum(hits) / len(hits)
            rivals = [other for other in last if other.own and other is not stage]
            if rivals and stage.own:
                table = np.array(
                    [await self._nats(some, one.adapter) for one in (stage, *rivals)]
                )  # [people, messages]
                result.recognised["author"] = float((table.argmin(0) == 0).mean())
                result.recognised["author_together"] = float(table.sum(1).argmin() == 0)
                result.recognised["over_each_other"] = float((table[1:].sum(1) > table[0].sum()).mean())

    async def _next_among(self, message: HeldOut, others: Sequence[HeldOut], adapter: AdapterRef | None) -> bool | None:
        """Whether the likeliest per token is the true one, among those of other people with the nearest lengths; None
        if too few have another text."""
        unlike = [other for other in others if other.text != message.text]
        if len(unlike) < CANDIDATES - 1:
            return None
        near = sorted(unlike, key=lambda other: (abs(other.tokens - message.tokens), other.entry_id))
        texts = [message.text, *(other.text for other in near[: CANDIDATES - 1])]
        found = await self.scored([self.draft(message, "", text) for text in texts], adapter)
        means = [sum(values) / len(values) for values in found]
        return max(range(len(means)), key=means.__getitem__) == 0

    async def _nats(self, messages: Sequence[HeldOut], adapter: AdapterRef | None) -> list[float]:
        found = await self.scored([self.draft(message, "") for message in messages], adapter)
        return [-sum(values) for values in found]

    async def _question(self, stages: Sequence[list[Stage]], results: Sequence[Result], limit: int) -> None:
        """Whether the assistant still knows what it knew."""
        ground = self._ground
        bare = await answers.answered(ground.engine, ground.tokenizer, None, ground.settings, limit)
        for place, (mine, result) in enumerate(zip(stages, results, strict=True)):
            ground.notify(f"asking beside {result.name}", place, len(results))
            own = await answers.answered(ground.engine, ground.tokenizer, mine[-1].adapter, ground.settings, limit)
            result.answered = {"base": sum(bare) / len(bare), "adapter": sum(own) / len(own)}


def _point(result: Result) -> dict[str, float]:
    """Of the curve: losses by the own tokens learned from."""
    return {"tokens": result.own_tokens, **{name: result.loss(name) for name in CURVE if name in result.nats}}


@dataclass(frozen=True, slots=True)
class _Measure:
    """Measures one person's messages under one condition after another."""

    trial: Trial
    pupil: Pupil
    messages: Sequence[HeldOut]
    result: Result

    async def __call__(
        self, name: str, adapter: AdapterRef | None, context: Context | None = None, watermark: EntryId = NOTHING
    ) -> None:
        """watermark: of what the version has absorbed, and is not quoted to it."""
        quoted = [await self.trial.quoted(self.pupil, message, context, watermark) for message in self.messages]
        framed = [self.trial.draft(message, text) for message, text in zip(self.messages, quoted, strict=True)]
        lengths = [len(one.targets) for one in framed]
        self.result.lengths = self.result.lengths or lengths
        assert lengths == self.result.lengths, "the same words count under every condition"
        found = await self.trial.scored(framed, adapter)
        self.result.nats[name] = [-sum(values) for values in found]
