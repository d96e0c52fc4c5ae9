"""The gate: does a candidate predict its user better than what serves now, and still talk like an assistant?

Each held-out message is scored as the user's turn, under the prompt that serving would build for it, each version with
its own watermark. What is judged was absorbed by neither side, and whatever is not a finite number is refused. The
assistant is judged twice, on neutral answers (drift) and on what the bare base itself would reply (forgetting): plain
answers may become likelier while what the base knows goes.

Cost: per side about SCORED_TOKENS, and the system text and own words of each message; then the reference set and the
base's replies to it under two models. At 2 ms a token that is one minute on a small CPU. More held-out messages get
shorter prompts, not more time.
"""

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jobs.dataset import TARGET_TOKENS, HeldOut
from jobs.rehearsal import Rehearsal
from persona import frames, prompt
from persona.domain import ChatTokenizer, Entry, EntryId, Message, Role, Version
from persona.engine.faces import Serving
from persona.engine.protocol import AdapterRef, ScoreRequest, ref
from persona.settings import Settings

SCORED_TOKENS = 12_000  # per side, of conversation and quoted history together
DRAWS = 2000
SEED = 20_261  # of the bootstrap: the same scores give the same verdict
REFERENCE = Path(__file__).with_name("reference.json")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says and why. Losses are natural logarithms per token of the user's own words."""

    keep: bool
    reason: str
    p_better: float
    loss_before: float
    loss_after: float
    drift: float  # of the loss on the reference set, relative to the bare base
    forgetting: float  # nats per token by which the bare base's own replies became less likely
    messages: int
    tokens: int

    def metrics(self) -> dict[str, Any]:
        """For the run's record; what is not finite has no JSON and stands as null."""
        values = asdict(self)
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared: an adapter and what it has absorbed."""

    adapter: AdapterRef | None
    watermark: EntryId


def side(version: Version | None) -> Side:
    """A version, or the bare base."""
    return Side(ref(version), version.watermark) if version else Side(None, EntryId(0))


@dataclass(frozen=True, slots=True)
class Loss:
    """Sum over a message's target, in nats."""

    nats: float
    tokens: int


class Gate:
    """Judges candidates of one user against `serving` (None: the bare base) on `held_out`.

    recent: entries that prompts may quote, ascending · context: tokens that a sequence may have.
    """

    def __init__(
        self,
        engine: Serving,
        tokenizer: ChatTokenizer,
        *,
        serving: Version | None,
        held_out: Sequence[HeldOut],
        recent: Sequence[Entry],
        rehearsal: Rehearsal,
        settings: Settings,
        context: int = 4096,
    ) -> None:
        self._scorer = Scorer(engine, tokenizer, held_out, recent, settings, context)
        self._serving, self._rehearsal, self._settings = serving, rehearsal, settings
        self._before: list[Loss] | None = None  # scored once, whoever is judged against it

    async def verdict(self, candidate: Version) -> Verdict:
        """Raises AdapterError if a file cannot be served, Busy if the engine cannot score or generate now."""
        if self._before is None:
            self._before = await self._scorer.messages(side(self._serving))
        mine = side(candidate)
        after = await self._scorer.messages(mine)
        return judge(self._before, after, await self._scorer.cost(mine.adapter, self._rehearsal), self._settings)


async def cost(
    engine: Serving, tokenizer: ChatTokenizer, adapter: AdapterRef, rehearsal: Rehearsal, settings: Settings
) -> "Cost":
    """What the assistant pays for `adapter`."""
    return await Scorer(engine, tokenizer, (), (), settings, settings.engine.context).cost(adapter, rehearsal)


def judge(before: Sequence[Loss], after: Sequence[Loss], cost: "Cost", settings: Settings) -> Verdict:
    """The verdict on two scorings of the same messages."""
    gain = np.array([old.nats - new.nats for old, new in zip(before, after, strict=True)])
    tokens = sum(loss.tokens for loss in after)
    p_better = better(gain) if np.isfinite(gain).all() else 0.0
    loss_before, loss_after = _mean(before), _mean(after)
    keep, reason = _decide(p_better, loss_before, loss_after, cost, settings)
    return Verdict(keep, reason, p_better, loss_before, loss_after, cost.drift, cost.forgetting, len(after), tokens)


def better(gain: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """P(the summed gain is above zero) when the messages are drawn anew, with replacement: a paired bootstrap.

    gain: [messages], nats that the candidate saves on each.
    """
    drawn = np.random.default_rng(SEED).integers(0, len(gain), size=(DRAWS, len(gain)))
    return float((gain[drawn].sum(axis=1) > 0).mean())


def _decide(
    p_better: float, loss_before: float, loss_after: float, cost: "Cost", settings: Settings
) -> tuple[bool, str]:
    learning = settings.learning
    if not all(map(math.isfinite, (loss_before, loss_after, cost.drift, cost.forgetting))):
        return False, "A score was not finite; the version is broken."
    change = f"{loss_before:.3f} → {loss_after:.3f} nats per token"
    if p_better < learning.keep_probability:
        return (
            False,
            f"Not surely better: {change}, P(better) {p_better:.2f}; {learning.keep_probability:.2f} is needed.",
        )
    if objection := cost.objection(settings):
        return False, objection
    return True, f"Better: {change}, P(better) {p_better:.2f}, {cost}."


@dataclass(frozen=True, slots=True)
class Cost:
    """What an adapter costs the assistant: of the loss on the reference set, relative to the bare base, NaN if that
    has none; and nats per token by which the base's own replies became less likely."""

    drift: float
    forgetting: float

    def __str__(self) -> str:
        return f"drift {self.drift:.2%}, forgetting {self.forgetting:.3f} nats per token"

    def objection(self, settings: Settings) -> str | None:
        """Why the adapter may not serve, as a sentence. What is not a number may not."""
        learning = settings.learning
        if not self.drift <= learning.max_drift:
            return f"Drift {self.drift:.2%} on the reference set; {learning.max_drift:.2%} is allowed."
        if not self.forgetting <= learning.max_forgetting:
            allowed = f"{learning.max_forgetting:.3f} are allowed (learning.max_forgetting)"
            return f"The base's own replies became less likely by {self.forgetting:.3f} nats per token; {allowed}."
        return None


@dataclass(frozen=True, slots=True)
class Assistant:
    """Loss per token, NaN of no tokens: on the reference set, and on the bare base's own replies to its questions."""

    reference: float
    replies: float

    def cost(self, after: "Assistant") -> Cost:
        """What it costs to become `after`, if this is the bare base."""
        drift = after.reference / self.reference - 1 if self.reference else math.nan
        return Cost(drift, after.replies - self.replies)


class Scorer:
    """Losses of one set of messages under any side."""

    def __init__(
        self,
        engine: Serving,
        tokenizer: ChatTokenizer,
        held_out: Sequence[HeldOut],
        recent: Sequence[Entry],
        settings: Settings,
        context: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._recent = recent
        self._settings = settings
        self._context = context
        share = SCORED_TOKENS // max(1, len(held_out))
        self._context_tokens = min(settings.learning.context_tokens, share)
        self._recent_tokens = min(settings.prompt.recent_tokens, share - self._context_tokens)

    async def messages(self, side: Side) -> list[Loss]:
        """All in one call, in slices beside serving: what their prompts share is computed once."""
        framed = [await asyncio.to_thread(self._turn, message, side.watermark) for message in self._held_out]
        return await self._losses(framed, side.adapter)

    async def cost(self, adapter: AdapterRef | None, rehearsal: Rehearsal) -> Cost:
        """What the assistant pays for `adapter`."""
        return (await self.assistant(None, rehearsal)).cost(await self.assistant(adapter, rehearsal))

    async def assistant(self, adapter: AdapterRef | None, rehearsal: Rehearsal) -> Assistant:
        asked = [([*self._system(""), Message(Role.USER, ask)], answer) for ask, answer in reference()]
        neutral = [frames.reply(context, answer, tokenizer=self._tokenizer) for context, answer in asked]
        own = await rehearsal.replies([ask for ask, _ in reference()])
        return Assistant(_mean(await self._losses(neutral, adapter)), _mean(await self._losses(own, adapter)))

    def _turn(self, message: HeldOut, watermark: EntryId) -> frames.Framed:
        """The prompt of `message` when it was sent, as a version with `watermark` would have got it."""
        lately = [
            entry
            for entry in self._recent
            if watermark < entry.id < message.entry_id and entry.id not in message.conversation
        ]
        said = frames.trim(message.context, self._context_tokens, self._tokenizer)

        def framed(quoted: str) -> frames.Framed:
            made = frames.turn(self._system(quoted) + said, message.text, tokenizer=self._tokenizer)
            return made.clipped(targets=TARGET_TOKENS, tokens=len(made.tokens))

        quoted = prompt.quote_recent(lately, self._tokenizer, self._recent_tokens).text
        made = framed(quoted)
        if quoted and (over := len(made.tokens) - self._context) > 0:  # the same words count under every version
            room = len(self._tokenizer.encode(quoted)) - over - prompt.SEAM_TOKENS
            made = framed(prompt.quote_recent(lately, self._tokenizer, max(0, room)).text)
        return made

    def _system(self, quoted: str) -> list[Message]:
        text = prompt.joined([self._settings.prompt.system, quoted])
        return [Message(Role.SYSTEM, text)] if text else []

    async def _losses(self, framed: Sequence[frames.Framed], adapter: AdapterRef | None) -> list[Loss]:
        clipped = [one.clipped(targets=TARGET_TOKENS, tokens=self._context) for one in framed]
        scores = await self._engine.score_all([ScoreRequest(one.tokens, one.targets, adapter) for one in clipped])
        return [Loss(-sum(some), len(some)) for some in scores]


@lru_cache(maxsize=1)
def reference() -> tuple[tuple[str, str], ...]:
    """Questions and neutral answers, written for persona: what an adapter must not unlearn."""
    items = json.loads(REFERENCE.read_text(encoding="utf-8"))
    return tuple((item["ask"], item["answer"]) for item in items)


def _mean(losses: Sequence[Loss]) -> float:
    tokens = sum(loss.tokens for loss in losses)
    return sum(loss.nats for loss in losses) / tokens if tokens else math.nan
