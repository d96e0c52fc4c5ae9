"""Who has a part in a step, and who leaves the last places to others. Pure Python over integers.

Where several users come, who has more than a like share leaves the last places and pages to others. And who has most of
what runs, the heavy user, has short steps: their prompts and their replies in turn, a quarter of the step's tokens for
the prompts, and while a prompt of another is computed one step of 32 for their prompts, and every second one for their
replies. So the others begin soon.
"""

from collections import Counter
from collections.abc import Collection, Iterator

from persona.engine.pages import PagePool
from persona.engine.sequence import Segment, Sequence
from persona.engine.waiting import Shares

KEPT = 1 / 8  # of the running places and of the pages, the last ones: for users who have less than a like share
PROMPTS_REST = 32  # of so many steps beside prompts of others a heavy user's own prompts sit out all but one
HEAVY = 4  # sequences that a user runs, at least, who is to leave others room


class Held:
    """What each user has of the running set, while others are admitted to it."""

    def __init__(self, running: Collection[Sequence], shares: Shares, places: int, pool: PagePool) -> None:
        """places: of the running set in all."""
        self._shares, self._places, self._pool = shares, places, pool
        self._running, self._pages = Counter[int](), Counter[int]()
        for one in running:
            self.add(one)

    def add(self, one: Sequence) -> None:
        self._running[one.user_id] += 1
        self._pages[one.user_id] += len(one.pages)

    def enough(self, one: Sequence) -> bool:
        """Whether the places or pages that are left are for others than this one's user. A like share counts one more
        user than there are: who may come."""
        user, sharing, total = one.user_id, self._shares.active + 1, self._pool.total
        if not user or not self._running[user] or self._shares.alone(user):
            return False
        few = self._places - self._running.total() <= int(KEPT * self._places)
        if few and self._running[user] >= max(HEAVY, self._places / sharing):
            return True
        if self._pages[user] < total / sharing:
            return False
        return self._pool.available - self._pool.needed(one.limit) < KEPT * total


class Turns:
    """Divides what runs into steps."""

    def __init__(self, shares: Shares, budget: int) -> None:
        """budget: tokens of prompts in a step."""
        self._shares, self._budget = shares, budget
        self._beside = 0  # steps in a row in which the heavy user stood beside prompts of others
        self._replied = False  # whether the heavy user's replies had the last step in which their prompts waited, too

    def next(self, running: list[Sequence]) -> tuple[list[Sequence], list[Segment]]:
        """Of the next step: who says one more token, and the pieces of prompts."""
        heavy = self._heavy(running)
        decode = [one for one in running if not one.prefilling]
        others = any(one.prefilling and one.user_id != heavy and not one.background for one in running)
        self._beside = self._beside + 1 if heavy is not None and others else 0
        segments = list(self._segments(running, heavy))
        if heavy is not None:
            prompts, replies = self._parts(heavy, decode, segments)
            segments = [piece for piece in segments if prompts or piece.sequence.user_id != heavy]
            decode = [one for one in decode if replies or one.user_id != heavy]
        return decode, segments

    def _heavy(self, running: list[Sequence]) -> int | None:
        """The user who has most of what runs, if others may want to begin."""
        users = Counter(one.user_id for one in running if one.user_id and not one.background)
        for user_id, count in users.most_common(1):
            if count >= HEAVY and 2 * count > len(running) and not self._shares.alone(user_id):
                return user_id
        return None

    def _parts(self, heavy: int, decode: list[Sequence], segments: list[Segment]) -> tuple[bool, bool]:
        """Whether prompts and replies of `heavy` have a part in this step, which has room for these. Who comes waits
        for the end of a step: so one that nobody else's prompt is in has either."""
        if self._beside:
            return self._beside % PROMPTS_REST == 0, self._beside % 2 == 0
        if not any(one.user_id == heavy for one in decode) or not any(p.sequence.user_id == heavy for p in segments):
            return True, True
        self._replied = not self._replied
        return not self._replied, self._replied

    def _segments(self, running: list[Sequence], heavy: int | None) -> Iterator[Segment]:
        """Chat first, who has had least before others, then scoring; among equals in order of admission. The prompts of
        `heavy` have a part of the budget, which comes after other chats, but for the one step of PROMPTS_REST."""
        budget, theirs = self._budget, self._budget // 4
        last = not self._beside or bool(self._beside % PROMPTS_REST)

        def turn(one: Sequence) -> tuple[bool, bool, float]:
            later = (one.user_id == heavy) is last
            return one.background, later, 0.0 if one.background else self._shares[one.user_id]

        for sequence in sorted((one for one in running if one.prefilling and not one.silent), key=turn):
            mine = heavy is not None and sequence.user_id == heavy
            if most := min(budget, theirs) if mine else budget:
                end = min(sequence.prompt, sequence.computed + most)
                budget -= end - sequence.computed
                theirs -= (end - sequence.computed) * mine
                yield Segment(sequence, sequence.computed, end)
