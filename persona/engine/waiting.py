"""Who is next: each user gets a like share of the engine, however many requests one of them sends.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024): a user's counter grows by
what the engine does for them, and who has the least is next. Who comes back after a pause starts at the least counter
of those who are active: nobody saves up, and nobody pays for having been served while the engine was idle.

What a request itself will cost (lengths.py) counts, too, several times: of those that are about equally entitled the
short ones go first, so that where there is not time for all, there is for more of them. That passes while it is its
user's next, by what each active user has had more than this one: a long request is passed over by no more than so many
tokens of each, whoever comes.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Generic, TypeVar

from persona.engine.lengths import Lengths, Waiting

OWN = 3.0  # times that a request's own cost counts beside its user's counter
LEAST = 8  # admissions behind an estimate
LATELY = 100_000.0  # of virtual time: who left no longer ago may come back any moment
AWAY = 1000  # counters of users who are away that are kept at most

S = TypeVar("S", bound=Waiting)


class Shares:
    """The counter of each user, and who is active: waits or runs."""

    def __init__(self) -> None:
        self._served: dict[int, float] = {}
        self._left: dict[int, float] = {}  # virtual time at which users who are away left
        self._active: Counter[int] = Counter()
        self._last = 0.0  # the highest counter of those who left
        self._passed = 0.0  # what each active user has had since the start if all had had alike: virtual time

    def __getitem__(self, user_id: int) -> float:
        return self._served.get(user_id, 0.0)

    def check(self, users: Iterable[int]) -> None:
        """Assert that these are the users of all requests that wait or run."""
        assert self._active == Counter(users), "requests are counted wrong"

    @property
    def active(self) -> int:
        """Users who wait or run."""
        return len(self._active)

    def alone(self, user_id: int) -> bool:
        """Whether nobody else is active, or was lately."""
        if any(other and other != user_id for other in self._active):
            return False
        return not any(other and other != user_id and self._passed - at < LATELY for other, at in self._left.items())

    def come(self, user_id: int) -> None:
        """One more request of the user."""
        if not self._active[user_id]:
            others = [self[other] for other, requests in self._active.items() if requests]
            self._served[user_id] = max(self[user_id], min(others, default=self._last))
            self._left.pop(user_id, None)
        self._active[user_id] += 1

    def go(self, user_id: int) -> None:
        """One request less."""
        self._active[user_id] -= 1
        if not self._active[user_id]:
            del self._active[user_id]
            self._last = max(self._last, self[user_id])
            self._left[user_id] = self._passed
            if len(self._served) > len(self._active) + AWAY:
                self._served = {user: self._served[user] for user in self._active}
                self._left = {user: at for user, at in self._left.items() if self._passed - at < LATELY}

    def charge(self, user_id: int, tokens: float) -> None:
        self._served[user_id] = self[user_id] + tokens
        self._passed += tokens / max(1, self.active)

    def behind(self, user_id: int) -> float:
        """How far this user is behind others; only differences between two moments say something."""
        return self._passed - self[user_id]


class WaitingRoom(Generic[S]):
    """Requests in order of arrival within a user, and by their counters between users."""

    def __init__(self, shares: Shares, lengths: Lengths) -> None:
        self._shares, self._lengths = shares, lengths
        self._queues: dict[int, deque[S]] = {}
        self._size = 0
        self._lag: dict[int, float] = {}  # how far behind each user was (Shares.behind) when their next one became it

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[S]:
        for queue in self._queues.values():
            yield from queue

    def add(self, one: S) -> None:
        if one.user_id not in self._queues:
            self._queues[one.user_id] = deque()
            self._lag[one.user_id] = self._shares.behind(one.user_id)
        self._queues[one.user_id].append(one)
        self._size += 1

    def discard(self, one: S) -> None:
        """Take it out, if it is here."""
        user, queue = one.user_id, self._queues.get(one.user_id, deque())
        if one not in queue:
            return
        self._size -= 1
        if one is queue[0]:
            self._lag[user] = self._shares.behind(user)
        queue.remove(one)
        if not queue:
            del self._queues[user], self._lag[user]

    def order(self, limit: int | None = None) -> list[S]:
        """The next ones, as they will be served if nobody else comes."""
        return list(islice(self._order(), limit))

    def _order(self) -> Iterator[S]:
        ticket, cost = count(), self._lengths.cost  # among equal counters, who was first in the room
        heap = [
            (
                self._shares[user] + max(0.0, OWN * cost(queue[0]) - max(0.0, self._waited(user))),
                next(ticket),
                self._shares[user],
                queue[0],
                islice(queue, 1, None),
            )
            for user, queue in self._queues.items()
        ]
        heapq.heapify(heap)
        while heap:
            _, place, served, one, behind = heap[0]
            yield one
            served += cost(one)
            if (following := next(behind, None)) is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (served + OWN * cost(following), place, served, following, behind))

    def _waited(self, user_id: int) -> float:
        """What each active user has had more than this one since their next request became it."""
        return self._shares.behind(user_id) - self._lag[user_id]


class Pace:
    """How fast requests leave a room that is never empty: what one who comes must expect to wait."""

    def __init__(self, sample: int = 32) -> None:
        self._left: deque[float] = deque(maxlen=sample)

    def left(self, now: float, *, others: bool) -> None:
        """One was admitted at `now`, in seconds; `others`: whether some still wait."""
        self._left.append(now)
        if not others:
            self.forget()

    def forget(self) -> None:
        """The room is empty, or was: who leaves it next tells nothing about those before."""
        self._left.clear()

    def wait(self, before: int) -> float:
        """Seconds until it is the turn of one with `before` others before it; 0 as long as too little is known."""
        if len(self._left) < LEAST:
            return 0.0
        return before * (self._left[-1] - self._left[0]) / (len(self._left) - 1)
