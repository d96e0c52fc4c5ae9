"""More requests than the engine can answer: how many have their first token in time, by the real scheduler.

    .venv/bin/python tests/bench/overload.py

A simulation: waiting room, scheduler and pace are the engine's, a step takes what its rows and prompt tokens are said
to cost (as on machine C of docs/BENCHMARKS.md), and nobody has an adapter. The workload is that of `persona bench`:
32 users at 1.5 times what 64 clients in a closed loop get, for 120 s, once with its own lengths and once with those
of S-LoRA's synthetic traces (Sheng et al. 2024: 8 to 512 tokens). One line for each weight of a request's own cost
(waiting.OWN): shares of the requests by seed, and the worst user of all; then the share of three users who always ask
for the longest, in a run of their own. Then about what nobody can exceed: who knew all requests beforehand would answer
the cheapest ones, as many as there is time for until the last may begin.
"""

import math
import statistics
import sys
from dataclasses import replace
from itertools import accumulate, chain, takewhile
from typing import Any

from persona.engine import waiting
from persona.engine.pages import PagePool
from persona.engine.scheduler import Scheduler
from persona.engine.sequence import Plan, Sequence
from persona.engine.shelf import Shelf
from persona.workload import Range, Request, Workload, requests

STEP, ROW, TOKEN = 0.006, 0.00184, 0.00105  # seconds: of a step, of each of its rows, of each prompt token
SECONDS, SLO, PATIENCE = 120.0, 6.0, 5.0
ROWS = 32  # places of the running set
LOOK = 0.25  # seconds between two looks for those who have waited too long
USERS, CLIENTS, SEEDS = 32, 64, (42, 1, 2, 3)
LONGEST = 3  # users who may always ask for the longest
LENGTHS = ((Range(64, 256), Range(16, 64)), (Range(8, 512), Range(8, 512)))  # of prompts and replies
WEIGHTS = (0.0, 1.0, 3.0, 10.0, math.inf)


class NoAdapters:
    """For the scheduler: nobody asks for one."""

    def __init__(self, pool: PagePool) -> None:
        self.shelf = Shelf[Any](pool)


class Simulation:
    """`told[n]`: of the n-th request, its user and the seconds to its first token; None if it was refused."""

    def __init__(self) -> None:
        pool = PagePool(1000, 32)
        nobody: Any = NoAdapters(pool)
        self.scheduler = Scheduler(pool, nobody, max_running=ROWS, max_waiting=256, prefill_tokens=256)
        self.pace, self.now, self.done = waiting.Pace(), 0.0, 0
        self.told: dict[int, tuple[int, float | None]] = {}
        self.here: dict[int, tuple[Sequence, Request, float]] = {}

    def come(self, request: Request, since: float, *, patient: bool) -> None:
        number = len(self.told)
        one = Sequence(number, [0] * request.prompt, request.prompt, request.prompt + request.reply)
        one.user_id = request.user + 1
        self.told[number], self.here[number] = (request.user, None), (one, request, since)
        self.scheduler.add(one)
        if not patient and self.pace.wait(self.scheduler.before(one)) > PATIENCE:
            self.leave(one)

    def leave(self, one: Sequence) -> None:
        self.scheduler.remove(one)
        del self.here[one.id]

    def send_away(self) -> None:
        for one in [one for one in self.scheduler.sequences() if not one.pages]:
            if self.now - self.here[one.id][2] > PATIENCE:
                self.leave(one)

    def step(self) -> int:
        """One step; how many replies ended."""
        plan = self.scheduler.plan()
        for _ in plan.admitted:
            self.pace.left(self.now, others=self.scheduler.waiting > 0)
        self.now += STEP + ROW * len(plan.decode) + TOKEN * sum(s.end - s.start for s in plan.prefill)
        self._advance(plan)
        spoken = [*plan.decode, *(s.sequence for s in plan.prefill if not s.sequence.prefilling)]
        ended = 0
        for one in spoken:
            _, request, since = self.here[one.id]
            one.tokens.append(0)
            if len(one.tokens) == one.prompt + 1:
                self.told[one.id] = request.user, self.now - since
            if len(one.tokens) == one.limit:
                self.leave(one)
                ended += 1
        self.done += ended
        return ended

    def _advance(self, plan: Plan) -> None:
        for one in plan.decode:
            one.computed += 1
        for segment in plan.prefill:
            segment.sequence.computed = segment.end
        self.scheduler.advanced(plan)


Lengths = tuple[Range, Range]


def workload(lengths: Lengths, rate: float | None, seed: int) -> Workload:
    return Workload(USERS, *lengths, rate=rate, seed=seed)


def capacity(lengths: Lengths) -> float:
    """Replies a second in the closed loop."""
    made, due = Simulation(), requests(workload(lengths, None, SEEDS[0]))
    for _ in range(CLIENTS):
        made.come(next(due), 0.0, patient=True)
    while made.here:
        ended = made.step()
        for _ in range(ended if made.now < SECONDS else 0):
            made.come(next(due), made.now, patient=True)
    return made.done / made.now


def overload(lengths: Lengths, rate: float, seed: int, *, longest: int = 0) -> dict[int, list[bool]]:
    """Of each user's requests, which were in time. longest: so many users always ask for the longest."""
    made, looked = Simulation(), 0.0
    due = list(takewhile(lambda request: request.at < SECONDS, requests(workload(lengths, rate, seed))))
    most = [length.high for length in lengths]
    due = [replace(one, prompt=most[0], reply=most[1]) if one.user < longest else one for one in due]
    while due or made.here:
        while due and due[0].at <= made.now:
            request = due.pop(0)
            made.come(request, request.at, patient=False)
        if made.now >= looked + LOOK:
            looked = made.now
            made.send_away()
        if made.here:
            made.step()
        elif due:
            made.now = due[0].at
    users: dict[int, list[bool]] = {}
    for user, seconds in made.told.values():
        users.setdefault(user, []).append(seconds is not None and seconds <= SLO)
    return users


def oracle(lengths: Lengths, rate: float, seed: int, seconds_of_work: float) -> float:
    """The largest share of the requests whose work fits into so many seconds."""
    due = takewhile(lambda request: request.at < SECONDS, requests(workload(lengths, rate, seed)))
    costs = sorted(TOKEN * one.prompt + (ROW + STEP / ROWS) * one.reply for one in due)
    return sum(spent <= seconds_of_work for spent in accumulate(costs)) / len(costs)


def compare(lengths: Lengths) -> None:
    prompts, replies = lengths
    most = capacity(lengths)
    sys.stdout.write(f"prompts {prompts.low}:{prompts.high}, replies {replies.low}:{replies.high}: ")
    sys.stdout.write(f"capacity {most:.2f} requests/s\n")
    for weight in WEIGHTS:
        waiting.OWN = weight if math.isfinite(weight) else 1e9
        found = [overload(lengths, 1.5 * most, seed) for seed in SEEDS]
        means = [statistics.mean(chain.from_iterable(users.values())) for users in found]
        shares = ", ".join(f"{mean:.2f}" for mean in means)
        worst = min(statistics.mean(theirs) for users in found for theirs in users.values())
        beside = [overload(lengths, 1.5 * most, seed, longest=LONGEST) for seed in SEEDS]
        long = statistics.mean(statistics.mean(users[user]) for users in beside for user in range(LONGEST))
        sys.stdout.write(f"own cost {weight:g} times: {shares}; mean {statistics.mean(means):.3f}, ")
        sys.stdout.write(f"worst user {worst:.2f}; who always asks for the longest {long:.2f}\n")
        sys.stdout.flush()
    bounds = [oracle(lengths, 1.5 * most, seed, SECONDS + SLO) for seed in SEEDS]
    shares = ", ".join(f"{share:.2f}" for share in bounds)
    sys.stdout.write(f"nobody: {shares}; mean {statistics.mean(bounds):.3f}\n")


if __name__ == "__main__":
    for one in LENGTHS:
        compare(one)
