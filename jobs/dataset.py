"""Which of a user's words train, and which only judge: examples and held-out messages from history.

Nothing leaves this file but redacted copies. Targets are the user's own words and the replies they accepted or
corrected; what others said stands in masked context. The newest messages are held out, and the new watermark lies
before them, so that no version has absorbed what it is judged by.
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from itertools import islice

from jobs.redact import redact
from persona import frames, prompt
from persona.domain import ChatTokenizer, Entry, EntryId, Finish, Frame, Line, Message, Origin, Role
from persona.engine.protocol import Example
from persona.settings import Learning

TARGET_TOKENS = 512  # of one message; of a longer one the beginning trains
JUDGED_TOKENS = TARGET_TOKENS  # of absorbed replies that were rated or corrected: so many train again in a run
COPIES = 3  # of one text that train, and of one text that are held out
LONG = 8  # tokens of a text that nobody says twice by chance: it is held out only where it was said first
EVENT_SHARE = 1 / 3  # of the tokens that the user wrote: so much may events add
LOOKBACK = 64  # entries before the first held-out one that the gate may quote in a prompt
QUOTED_ENTRIES = 16  # entries looked at for a quotation
CONTEXT_ENTRIES = 16  # turns of a conversation looked at for context

_OWN = (Origin.CHAT, Origin.IMPORT)
_FENCE = re.compile(r"^[ ]{0,3}(```|~~~).*?(?:^[ ]{0,3}\1[`~]*[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)
_NICK = r"(?:\[?\d{1,2}:\d\d(?::\d\d)?\]?\s*)?<[ @+]?[\w\[\]\\`^{|}-]{1,32}>[ \t]"  # a pasted line of a chat
_QUOTE = re.compile(rf"^[ ]{{0,3}}(?:>|{_NICK}).*$", re.MULTILINE)
_NOTHING = EntryId(0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One example and where it comes from."""

    example: Example
    entry_id: EntryId
    frame: Frame


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A message that judges: the user's words, what was said before, and the entries of its conversation."""

    entry_id: EntryId
    text: str
    context: tuple[Message, ...]
    conversation: frozenset[EntryId]
    tokens: int
    lines: tuple[Line, ...] = ()  # the same context for a draft


@dataclass(frozen=True, slots=True)
class Dataset:
    """What one run trains on and is judged by."""

    examples: list[Sample]
    held_out: list[HeldOut]
    watermark: EntryId  # the last entry that the new version will have absorbed
    new_tokens: int  # own tokens that no version has trained on yet
    passes: int
    recent: tuple[Entry, ...]  # what a held-out message's prompt may quote, ascending


@dataclass(frozen=True, slots=True)
class Deferred:
    """Too little to train on or to judge by; `reason` is one sentence."""

    reason: str


def build(
    entries: Sequence[Entry],
    *,
    tokenizer: ChatTokenizer,
    settings: Learning,
    replay: Sequence[Entry] = (),
    seen: EntryId = _NOTHING,
    system: str = "",
    longest: int = 4096,
) -> Dataset | Deferred:
    """The dataset of a run.

    entries: not absorbed by the version to start from, ascending · replay: absorbed by it, ascending · seen: the last
    entry that any version which may serve has absorbed · system: text that serving puts first · longest: tokens of a
    sequence, at most.
    """
    copies = _Copies([*replay, *entries], tokenizer, settings, system, longest)
    held_out = copies.hold_out([entry for entry in entries if entry.id > seen])
    if isinstance(held_out, Deferred):
        return held_out
    fresh = [entry for entry in entries if entry.id < held_out[0].entry_id]
    texts: Counter[str] = Counter()
    needed = max(1, settings.min_aged_tokens // 2)
    found = _without_copies(copies.targets(fresh), texts)
    within = _within(found, settings.max_run_tokens, by=lambda target: target.source)
    new = _within_event_share(within, needed)
    new_tokens = sum(target.tokens for target in new)
    if new_tokens < needed:
        return Deferred(f"Only {new_tokens} new tokens to train on beside the held-out messages; {needed} are needed.")
    old: list[_Target] = []
    for some, limit in ((_judged(replay), JUDGED_TOKENS), (_scattered(replay), settings.replay_tokens)):
        old += _within(_without_copies(copies.targets(some), texts), limit, by=lambda _: "")
    examples, passes = copies.layout(_deal(new, old))
    if not examples:
        return Deferred("No message fits into one run; raise learning.max_run_tokens.")
    first = next(i for i, entry in enumerate(entries) if entry.id == held_out[0].entry_id)
    recent = [*replay, *entries][max(0, len(replay) + first - LOOKBACK) :]
    return Dataset(examples, held_out, max(entry.id for entry in fresh), new_tokens, passes, redacted(recent))


def everything(
    entries: Sequence[Entry], *, tokenizer: ChatTokenizer, settings: Learning, system: str = "", longest: int = 4096
) -> list[Sample]:
    """All of a history as examples, nothing held out: for a prior. The newest words that fit max_run_tokens."""
    copies = _Copies(entries, tokenizer, settings, system, longest)
    return copies.layout(list(_without_copies(copies.targets(entries), Counter())))[0]


def judging(entries: Sequence[Entry], *, tokenizer: ChatTokenizer, settings: Learning) -> frozenset[EntryId]:
    """Which of these entries, ascending, may judge a version that serves: the user's own messages, none of them empty,
    and of each text the first COPIES. What came as an event judges none: others may have sent it."""
    own = [entry for entry in entries if entry.role is Role.USER and entry.origin in _OWN]
    targets = _Copies(own, tokenizer, settings, "", 0).targets(own[::-1])
    return frozenset(target.entry.id for target in _without_copies(targets, Counter()))


def message(
    entry: Entry, before: Sequence[Entry], *, tokenizer: ChatTokenizer, settings: Learning
) -> tuple[HeldOut, tuple[Entry, ...]]:
    """One of the `judging` entries as a message that judges, and what its prompt may quote of those before it."""
    copies = _Copies([*before, entry], tokenizer, settings, "", 0)
    (target,) = copies.targets([entry])
    return copies.held(target), redacted(before)


def own_words(text: str) -> str:
    """What the user wrote themselves: without quoted lines, pasted chat lines and fenced blocks."""
    return _QUOTE.sub("", _FENCE.sub("", text)).strip()


@dataclass(frozen=True, slots=True)
class _Target:
    entry: Entry
    text: str
    frames: tuple[Frame, ...]
    tokens: int
    whole: bool = True  # its end is where the speaker stopped

    @property
    def source(self) -> str:
        """What a quota is for: each kind of event is a source of its own."""
        origin = self.entry.origin
        return f"{origin}/{self.entry.conversation}" if origin is Origin.EVENT else origin.value


class _Copies:
    """Redacted copies of one user's history, and examples made from them."""

    def __init__(
        self, entries: Sequence[Entry], tokenizer: ChatTokenizer, settings: Learning, system: str, longest: int
    ) -> None:
        self._by_id: Mapping[EntryId, Entry] = {entry.id: entry for entry in entries}
        self._tokenizer = tokenizer
        self._settings = settings
        self._system = system
        self._ordered = sorted(entries, key=lambda entry: entry.id)
        self._longest = longest
        self._targets: dict[EntryId, _Target | None] = {}  # each is redacted and counted once

    def hold_out(self, entries: Sequence[Entry]) -> list[HeldOut] | Deferred:
        """The newest of the user's own messages, ascending, as few as suffice to judge.

        Those that came as events judge too, if the others are too few.
        """
        found = self._hold_out(entries, _OWN)
        return self._hold_out(entries, (*_OWN, Origin.EVENT)) if isinstance(found, Deferred) else found

    def _hold_out(self, entries: Sequence[Entry], origins: Collection[Origin]) -> list[HeldOut] | Deferred:
        messages, enough = self._settings.held_out_messages, self._settings.held_out_tokens
        held: list[HeldOut] = []
        tokens = 0
        own = [entry for entry in entries if entry.role is Role.USER and entry.origin in origins]
        first = self._first_said()
        new = (target for target in self.targets(own) if first[_said(target)] == target.entry.id)
        for target in _without_copies(new, Counter()):
            held.append(self.held(target))
            tokens += target.tokens
            if len(held) >= messages and tokens >= enough:
                return held[::-1]
        return Deferred(
            f"Only {len(held)} new messages with {tokens} tokens; judging a version takes {messages} with {enough},"
            " and training takes more."
        )

    def _first_said(self) -> dict[tuple[str, datetime | None], EntryId]:
        """Where each of the user's texts came first, copies taken for one."""
        first: dict[tuple[str, datetime | None], EntryId] = {}
        for target in self.targets([entry for entry in self._ordered if entry.role is Role.USER]):
            first[_said(target)] = target.entry.id  # the newest first
        return first

    def targets(self, entries: Sequence[Entry]) -> Iterator[_Target]:
        """What trains among `entries`, newest first (in reverse of their order)."""
        for entry in reversed(entries):
            if entry.id not in self._targets:
                self._targets[entry.id] = self._target(entry)
            if (target := self._targets[entry.id]) is not None:
                yield target

    def layout(self, targets: Sequence[_Target]) -> tuple[list[Sample], int]:
        """Samples and passes within max_run_tokens: (samples, passes).

        Breadth comes before repetition: each message in one of its frames, the first one first; then each in its other
        frame; then, as far as the budget reaches, further passes. Within a pass the frames alternate.
        """
        budget, spent = self._settings.max_run_tokens, 0
        passes: list[list[Sample]] = [[], []]
        for number, samples in enumerate(passes):
            for i, target in enumerate(targets):
                if number >= len(target.frames):
                    continue
                sample = self._sample(target, target.frames[(i + number) % len(target.frames)])
                spent += len(sample.example.tokens)
                if spent > budget:
                    return [*passes[0][::-1], *passes[1][::-1]], 1
                if sample.example.targets:
                    samples.append(sample)
        return [*passes[0][::-1], *passes[1][::-1]], min(self._settings.passes, budget // max(1, spent))

    def _target(self, entry: Entry) -> _Target | None:
        if entry.origin is Origin.REPLY:
            return self._reply(entry)
        if entry.role is not Role.USER:
            return None
        kinds = (Frame.TURN,) if entry.origin is Origin.EVENT else (Frame.TURN, Frame.DRAFT)
        return self._worded(entry, redact(own_words(entry.text)), kinds)

    def _reply(self, entry: Entry) -> _Target | None:
        """Only what the user corrected or accepted; never a rejected text."""
        if not entry.correction and (entry.rating or 0) < 1:
            return None
        text = redact(prompt.without_thoughts(entry.correction or entry.text))
        return self._worded(entry, text, (Frame.REPLY,), whole=bool(entry.correction) or entry.finish is Finish.STOP)

    def _worded(self, entry: Entry, text: str, kinds: tuple[Frame, ...], *, whole: bool = True) -> _Target | None:
        tokens = min(len(self._tokenizer.encode(text)), TARGET_TOKENS)
        return _Target(entry, text, kinds, tokens, whole) if tokens else None

    def held(self, target: _Target) -> HeldOut:
        """`target` as a message that judges."""
        entry = target.entry
        ids = frozenset(turn.id for turn in self._chain(entry)) | {entry.id}
        return HeldOut(entry.id, target.text, tuple(self._heard(entry)), ids, target.tokens, tuple(self._lines(entry)))

    def _sample(self, target: _Target, frame: Frame) -> Sample:
        framed = self._frame(target, frame)
        kept = len(framed.targets) if target.whole else len(framed.targets) - 1
        framed = framed.clipped(targets=min(kept, TARGET_TOKENS), tokens=self._longest)
        return Sample(Example(framed.tokens, framed.targets), target.entry.id, frame)

    def _frame(self, target: _Target, frame: Frame) -> frames.Framed:
        tokenizer, limit = self._tokenizer, self._settings.context_tokens
        quoted = self._quoted(target.entry)
        if frame is Frame.DRAFT:
            lines = frames.trim_lines(self._lines(target.entry), limit, tokenizer)
            return frames.draft(lines, target.text, quoted=quoted, tokenizer=tokenizer)
        system = prompt.joined([self._system, quoted])
        context = [Message(Role.SYSTEM, system)] if system else []
        context += frames.trim(self._heard(target.entry), limit, tokenizer)
        make = frames.reply if frame is Frame.REPLY else frames.turn
        return make(context, target.text, tokenizer=tokenizer)

    def _quoted(self, entry: Entry) -> str:
        """For every second entry, its recent history as serving quotes it: an adapter that never saw a quotation
        would continue it in place of answering."""
        if not self._settings.quoted_tokens or blake2b(b"%d" % entry.id, digest_size=1).digest()[0] % 2:
            return ""
        before = bisect_left(self._ordered, entry.id, key=lambda other: other.id)
        known = {turn.id for turn in islice(self._chain(entry), CONTEXT_ENTRIES)}
        recent = [e for e in self._ordered[max(0, before - QUOTED_ENTRIES) : before] if e.id not in known]
        return prompt.quote_recent(redacted(recent), self._tokenizer, self._settings.quoted_tokens).text

    def _heard(self, entry: Entry) -> list[Message]:
        """What stood before `entry`, as a turn's context."""
        if entry.context:
            return frames.heard(_redacted_lines(entry.context))
        turns = list(islice(self._chain(entry), CONTEXT_ENTRIES))
        return prompt.merged(Message(turn.role, redact(turn.text)) for turn in reversed(turns))

    def _lines(self, entry: Entry) -> list[Line]:
        """What stood before `entry`, as a draft's context."""
        return _redacted_lines(entry.context) if entry.context else frames.lines(self._heard(entry))

    def _chain(self, entry: Entry) -> Iterator[Entry]:
        """The turns before `entry` in its conversation, nearest first."""
        parent = entry.parent
        while parent is not None and (turn := self._by_id.get(parent)) is not None:
            yield turn
            parent = turn.parent


def _said(target: _Target) -> tuple[str, datetime | None]:
    """What makes it a copy of another: its text, and that of a short one with its time, as it may come again."""
    return _normal(target.text), target.entry.ts if target.tokens < LONG else None


def _without_copies(targets: Iterable[_Target], texts: Counter[str]) -> Iterator[_Target]:
    """Each text at most COPIES times; `texts` counts, across calls."""
    for target in targets:
        texts[_normal(target.text)] += 1
        if texts[_normal(target.text)] <= COPIES:
            yield target


def _within(targets: Iterable[_Target], limit: int, *, by: Callable[[_Target], str]) -> list[_Target]:
    """Of each group the first ones that fit `limit` tokens beside each other."""
    tokens: Counter[str] = Counter()
    kept: list[_Target] = []
    for target in targets:
        if tokens[by(target)] + target.tokens <= limit:
            tokens[by(target)] += target.tokens
            kept.append(target)
    return kept


def _within_event_share(targets: Sequence[_Target], enough: int) -> list[_Target]:
    """Events add at most EVENT_SHARE to what was written, unless that is not `enough` to train on without them."""
    written = sum(target.tokens for target in targets if target.entry.origin is not Origin.EVENT)
    if written < enough:
        return list(targets)
    room = written * EVENT_SHARE
    kept: list[_Target] = []
    for target in targets:
        if target.entry.origin is Origin.EVENT:
            if target.tokens > room:
                continue
            room -= target.tokens
        kept.append(target)
    return kept


def _deal(new: Sequence[_Target], old: Sequence[_Target]) -> list[_Target]:
    """All targets, dealt so that whoever cuts the end leaves every source a fair share.

    The next one always comes from the source with the fewest tokens dealt so far; old targets are a source as well.
    """
    sources: dict[str, list[_Target]] = defaultdict(list)
    for target in new:
        sources[target.source].append(target)
    sources["replay"] = list(old)
    waiting = {name: iter(targets) for name, targets in sources.items()}
    tokens = dict.fromkeys(waiting, 0)
    dealt: list[_Target] = []
    while waiting:
        name = min(waiting, key=lambda source: tokens[source])
        if (following := next(waiting[name], None)) is None:
            del waiting[name]
        else:
            tokens[name] += following.tokens
            dealt.append(following)
    return dealt


def _judged(entries: Sequence[Entry]) -> list[Entry]:
    """Replies that the user rated or corrected, perhaps after a version had absorbed them."""
    return [entry for entry in entries if entry.rating is not None or entry.correction is not None]


def _scattered(entries: Sequence[Entry]) -> list[Entry]:
    """The others, so that the last ones are from all over the history."""
    others = [entry for entry in entries if entry.rating is None and entry.correction is None]
    # Hashes scatter the ids, and scatter them alike in every run.
    return sorted(others, key=lambda entry: blake2b(b"%d" % entry.id, digest_size=8).digest())


def redacted(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Copies that a prompt may quote: nothing secret, nobody else's words."""
    return tuple(replace(entry, text=redact(entry.text), context=(), correction=None) for entry in entries)


def _redacted_lines(context: Sequence[Line]) -> list[Line]:
    return [Line(redact(line.author), redact(line.text)) for line in context]


def _normal(text: str) -> str:
    """Copies that differ in case, digits or punctuation are one text."""
    return re.sub(r"[\W\d_]+", " ", text.casefold()).strip() or re.sub(r"\d+", "0", text)
