"""Whose turn it is: a crowd of one user's requests keeps nobody waiting, and who cannot be served is told early."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Models
from plain import some_tokens
from workbench import Bench

from persona.engine import protocol
from persona.engine.lengths import GENERATED, KEPT, LONG, Lengths
from persona.engine.waiting import LATELY, OWN, Pace, Shares, WaitingRoom


@dataclass(eq=False)
class Request:
    user_id: int
    prompt: int = 10
    reply: int = 0

    @property
    def limit(self) -> int:
        return self.prompt + self.reply


def room(*requests: Request) -> tuple[WaitingRoom[Request], Shares]:
    shares = Shares()
    made = WaitingRoom[Request](shares, Lengths())
    for one in requests:
        shares.come(one.user_id)
        made.add(one)
    return made, shares


def users(requests: list[Request]) -> list[int]:
    return [one.user_id for one in requests]


# --- the order


def test_users_take_turns_however_many_requests_one_of_them_has() -> None:
    waiting, _ = room(*[Request(1) for _ in range(6)], *[Request(2) for _ in range(2)], Request(3))
    assert users(waiting.order()) == [1, 2, 3, 1, 2, 1, 1, 1, 1]
    assert users(waiting.order(4)) == [1, 2, 3, 1]


def test_a_user_of_long_prompts_gets_fewer_turns() -> None:
    waiting, _ = room(*[Request(1, 40) for _ in range(3)], *[Request(2, 10) for _ in range(16)])
    assert users(waiting.order(16)) == [2] * 9 + [1] + [2] * 4 + [1, 2]


def test_of_users_who_had_as_much_the_one_who_asks_for_less_is_next() -> None:
    waiting, shares = room(Request(1, 50, 40), Request(2, 50, 30), Request(3, 60, 0))
    assert users(waiting.order()) == [3, 2, 1]
    shares.charge(3, 300)
    assert users(waiting.order()) == [2, 1, 3]


def test_who_sets_no_bound_to_a_reply_is_not_taken_for_the_dearest() -> None:
    waiting, _ = room(Request(1, 20, 8000), Request(2, 40, LONG))
    assert users(waiting.order()) == [1, 2]


def test_requests_of_one_user_keep_their_order() -> None:
    mine = [Request(1, prompt) for prompt in (5, 50, 7)]
    waiting, _ = room(mine[0], Request(2), mine[1], mine[2])
    assert [one for one in waiting.order() if one.user_id == 1] == mine


def test_who_comes_back_has_saved_nothing_up() -> None:
    _, shares = room(Request(1))
    shares.charge(1, 1000)
    shares.come(2)
    assert shares[2] == 1000  # not a thousand turns in a row
    shares.charge(2, 30)
    shares.charge(1, 10)
    shares.go(2)
    shares.come(2)
    assert shares[2] == 1030


def test_who_was_served_alone_does_not_pay_for_it() -> None:
    shares = Shares()
    shares.come(1)
    shares.charge(1, 1000)
    shares.go(1)
    shares.come(2)
    shares.come(1)
    assert shares[2] == shares[1]


def test_who_left_long_ago_does_not_count_as_company() -> None:
    shares = Shares()
    shares.come(1)
    assert shares.alone(1)
    shares.come(2)
    shares.charge(2, 10)
    assert not shares.alone(1)
    shares.go(2)
    assert not shares.alone(1), "user 2 may come back any moment"
    shares.charge(1, LATELY - 1)
    assert not shares.alone(1)
    shares.charge(1, 1)
    assert shares.alone(1)
    shares.come(2)
    assert not shares.alone(1)


def test_thousands_who_left_are_forgotten() -> None:
    shares = Shares()
    for user in range(5000):
        shares.come(user)
        shares.charge(user, 10)
        shares.go(user)
    assert len(shares._served) < 1100


@given(st.integers(0, 1000), st.lists(st.integers(1, 60), min_size=2, max_size=5))
def test_backlogged_users_are_served_alike(seed: int, longest: list[int]) -> None:
    """As in the paper there is a bound: no further apart than some times the dearest request."""
    source = random.Random(seed)
    waiting, shares = room()
    served = dict.fromkeys(range(len(longest)), 0.0)

    def refill(user: int) -> None:
        shares.come(user)
        waiting.add(Request(user, source.randint(1, longest[user])))

    for user in served:
        for _ in range(3):
            refill(user)
    for _ in range(200):
        (one,) = waiting.order(1)
        waiting.discard(one)
        refill(one.user_id)
        spent = one.prompt + GENERATED * source.randint(0, 20)
        shares.charge(one.user_id, spent)
        served[one.user_id] += spent
        shares.go(one.user_id)
        assert max(served.values()) - min(served.values()) <= (OWN + 2) * (max(longest) + GENERATED * 20)


@pytest.mark.parametrize("others", [1, 2, 10])
def test_a_long_request_is_passed_over_for_so_long_and_no_longer(others: int) -> None:
    """However many come who ask for little: each new, none of them served before."""
    waiting, shares = room(long := Request(1, 4000, 64))
    cost = Lengths().cost
    newcomers, served = iter(range(2, 10_000)), 0.0

    def come() -> None:
        one = Request(next(newcomers), 100, 64)
        shares.come(one.user_id)
        waiting.add(one)

    for _ in range(others):
        come()
    while (one := waiting.order(1)[0]) is not long:
        waiting.discard(one)
        come()
        shares.charge(one.user_id, cost(one))
        shares.go(one.user_id)
        served += cost(one)
        assert served <= (others + 3) * OWN * cost(long)


def test_who_is_served_meanwhile_is_not_let_in_for_having_waited() -> None:
    waiting, shares = room(*[Request(1, 50) for _ in range(9)])
    shares.charge(1, 5000)
    shares.come(2)
    waiting.add(Request(2, 40))
    assert users(waiting.order(1)) == [2]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60))
def test_the_room_counts_who_is_in_it(moves: list[tuple[int, bool]]) -> None:
    waiting, _ = room()
    here: list[Request] = []
    for user, comes in moves:
        if comes or not here:
            here.append(Request(user))
            waiting.add(here[-1])
        else:
            waiting.discard(here.pop(user % len(here)))
            waiting.discard(Request(user))  # was never here
        assert len(waiting) == len(here) == len(waiting.order())
        assert {id(one) for one in waiting} == {id(one) for one in here}


# --- how long replies get


def _replied(lengths: Lengths, user: int, bound: int, tokens: int, times: int = 20) -> None:
    for _ in range(times):
        lengths.ended(user, bound, tokens)


def test_each_users_replies_say_what_the_next_will_cost() -> None:
    lengths = Lengths()
    assert lengths.expected(1, 60) == 60
    assert lengths.expected(1, 4000) == LONG
    _replied(lengths, 1, 4000, 40)
    _replied(lengths, 2, 4000, 4000)
    _replied(lengths, 2, 16, 16)
    assert lengths.expected(1, 4000) == pytest.approx(40, rel=0.02)
    assert lengths.expected(2, 4000) == pytest.approx(4000, rel=0.02)
    assert lengths.expected(2, 16) == 16
    assert lengths.cost(Request(1, 10, 4000)) == pytest.approx(10 + GENERATED * 40, rel=0.02)


def test_who_sends_most_does_not_say_what_others_replies_will_come_to() -> None:
    lengths = Lengths()
    _replied(lengths, 1, 4000, 4000, times=500)
    _replied(lengths, 2, 4000, 0)
    _replied(lengths, 3, 4000, 400)
    assert lengths.expected(4, 4000) == pytest.approx((4000 + 0 + 400) / 3, rel=0.02)
    lengths.forget(1)
    assert lengths.expected(4, 4000) == pytest.approx(200, rel=0.05)
    for user in (2, 3, 5):
        lengths.forget(user)
    assert lengths.expected(4, 4000) == LONG


def test_lengths_of_thousands_of_users_are_forgotten() -> None:
    lengths = Lengths()
    for user in range(2 * KEPT):
        lengths.ended(user, 100, 100 if user < KEPT else 20)
    assert len(lengths._parts) == KEPT
    assert lengths.expected(0, 100) < 30


# --- how long it will take


@pytest.mark.parametrize("place", [0, 1, 7])
def test_the_pace_tells_how_long_it_will_take(place: int) -> None:
    pace = Pace()
    for second in range(20):
        pace.left(second / 2, others=True)
    assert pace.wait(place) == pytest.approx(place / 2)
    pace.left(10.0, others=False)
    assert pace.wait(place) == 0.0  # nobody waits any more: nothing is known of the next crowd


# --- in the engine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_light_user_is_answered_amid_a_flood(models: Models) -> None:
    bench = Bench(models, running=2)
    flood = [bench.generate(some_tokens(20, seed=seed), count=10, user=1) for seed in range(40)]
    bench.work(2)
    light = bench.generate(some_tokens(20, seed=99), count=4, user=2)
    for _ in range(40):
        bench.work()
        if bench.end(light):
            break
    assert bench.end(light) == "length"
    assert sum(bench.end(job) is not None for job in flood) <= 6
    bench.finish()
    assert all(bench.end(job) == "length" for job in flood)


def test_prompts_of_who_had_least_are_computed_first(models: Models) -> None:
    bench = Bench(models, prefill=32)
    for seed in range(3):
        bench.generate(some_tokens(100, seed=seed), count=4, user=1)
    bench.work()
    light = bench.generate(some_tokens(20, seed=9), count=4, user=2)
    bench.work(2)  # from equal counters on, of 300 tokens that wait
    assert len(bench.answers.get(light, [])) == 1


def _flooded(models: Models, running: int, flood: int) -> tuple[Bench, list[int]]:
    """User 1 runs `flood` long replies, and user 2 has been there."""
    bench = Bench(models, running=running, prefill=32)
    bench.alone(some_tokens(5), None, 1, user=2)
    jobs = [bench.generate(some_tokens(8, seed=seed), count=100, user=1) for seed in range(flood)]
    while not all(bench.answers.get(job) for job in jobs[: running - running // 8]):
        bench.work()
    return bench, jobs


def test_one_user_never_has_all_places_where_others_come(models: Models) -> None:
    bench, _ = _flooded(models, running=8, flood=12)
    bench.work(3)
    assert (bench.health().running, bench.health().waiting) == (7, 5)
    light = bench.generate(some_tokens(20, seed=99), count=4, user=2)
    bench.work(2)
    assert bench.answers[light]
    alone = Bench(models, running=8)
    for seed in range(12):
        alone.generate(some_tokens(8, seed=seed), count=100, user=1)
    alone.work(9)
    assert alone.health().running == 8


def test_who_runs_more_than_a_like_share_leaves_the_last_places_to_others(models: Models) -> None:
    bench, jobs = _flooded(models, running=16, flood=20)
    others = [bench.generate(some_tokens(8, seed=90 + user), count=100, user=user) for user in (2, 3, 4)]
    bench.work(3)
    assert (bench.health().running, bench.health().waiting) == (16, 7)  # one place was free, two were kept
    for job in jobs[:3]:
        bench.abort(job)
    bench.work(3)
    assert bench.health().running == 14
    others += [bench.generate(some_tokens(8, seed=90 + user), count=100, user=user) for user in (5, 6)]
    bench.work(2)
    assert all(bench.answers[job] for job in others)


def test_who_holds_more_than_a_like_share_leaves_the_last_pages_to_others(models: Models) -> None:
    """Few requests, all of them long: there are places enough, and no pages."""
    bench = Bench(models, pages=160, running=32)
    bench.alone(some_tokens(5), None, 1, user=2)
    jobs = [bench.generate(some_tokens(40, seed=seed), count=120, user=1) for seed in range(20)]
    bench.work(10)
    assert bench.health().running == 7  # of 20 pages each, and an eighth is left
    light = bench.generate(some_tokens(40, seed=99), count=100, user=2)
    bench.work(3)
    assert bench.answers[light]
    bench.finish()
    assert all(bench.end(job) == "length" for job in [*jobs, light])


def test_a_prompt_that_is_scored_for_a_user_waits_and_counts_like_a_chat(models: Models) -> None:
    clock = Clock()
    bench = Bench(models, running=1, waiting=3, patience=5.0, clock=clock)
    running = bench.generate(some_tokens(10), count=60, user=1)
    bench.work(2)
    jobs = [
        bench.ask(lambda job: protocol.Score(job, protocol.ScoreRequest(some_tokens(30), [5, 9], user_id=1)))
        for _ in range(5)
    ]
    assert [bench.failure(job).kind for job in jobs[3:]] == ["Busy"] * 2
    light = bench.generate(some_tokens(10), count=3, user=2)
    assert bench.failure(jobs[2]).kind == "Busy"  # the newest of who asked for most
    clock.now = 6.0
    bench.work()
    assert [bench.failure(job).kind for job in (*jobs[:2], light)] == ["Busy"] * 3
    bench.finish()
    assert bench.end(running) == "length"


def test_prompts_of_who_has_most_of_what_runs_go_on_beside_an_endless_stream_of_others(models: Models) -> None:
    bench = Bench(models, running=16, prefill=32)
    bench.alone(some_tokens(5), None, 1, user=2)
    jobs = [bench.generate(some_tokens(60, seed=seed), count=2, user=1) for seed in range(6)]
    bench.work()
    for number in range(4000):
        bench.generate(some_tokens(30, seed=100 + number), count=1, user=2 + number % 3)  # a step for each
        bench.work()
        if all(bench.end(job) for job in jobs):
            break
    assert [bench.end(job) for job in jobs] == ["length"] * 6


def _generated(bench: Bench, *jobs: int) -> int:
    return sum(bench.loop._underway._jobs[job].generated for job in jobs)


def test_who_has_most_of_what_runs_sits_out_every_second_step_of_anothers_prompt(models: Models) -> None:
    bench, jobs = _flooded(models, running=8, flood=5)
    light, before = bench.generate(some_tokens(20 + 32 + 32, seed=99), count=4, user=2), _generated(bench, *jobs)
    grown = []
    while not _generated(bench, light):
        bench.work()
        grown.append(_generated(bench, *jobs) - before)
    assert grown == [0, 5, 5]
    bench.finish()
    assert all(bench.end(job) == "length" for job in jobs)


def test_prompts_of_who_has_most_of_what_runs_come_in_short_steps(models: Models) -> None:
    bench, jobs = _flooded(models, running=8, flood=5)
    others = bench.generate(some_tokens(8, seed=98), count=100, user=2)
    bench.work(2)
    another, before = bench.generate(some_tokens(24, seed=99), count=1, user=1), _generated(bench, *jobs)
    theirs, grown = _generated(bench, others), []
    while not bench.answers.get(another):
        bench.work()
        grown.append(_generated(bench, *jobs) - before)
    assert grown == [5, 5, 10, 10, 15, 15]  # of 8 prompt tokens each, a quarter of what others get, or of replies
    assert _generated(bench, others) == theirs + 6  # whose steps these are, too


def test_a_reply_that_ends_early_makes_the_next_one_of_its_user_cheaper(models: Models) -> None:
    bench = Bench(models, running=1)
    lengths = bench.scheduler._lengths
    for user, count in ((1, 2), (2, 20)):
        for seed in range(8):
            job = bench.generate(some_tokens(10, seed=seed), count=120, user=user)
            waits = bench.generate(some_tokens(10, seed=seed), count=120, user=user)
            while _generated(bench, job) < count:
                bench.work()
            bench.abort(waits)  # in the room: says nothing
            bench.abort(job)  # its client left
            bench.work()
        assert lengths.expected(user, 120) == pytest.approx(count, abs=2)
    bench.ask(lambda job: protocol.Drop(job, 1))
    bench.work()
    assert lengths.expected(1, 120) == lengths.expected(2, 120)  # all that is left


def test_in_a_full_room_the_newest_of_whoever_has_most_leaves(models: Models) -> None:
    bench = Bench(models, running=1, waiting=5)
    running = bench.generate(some_tokens(10), count=30, user=9)
    bench.work()
    crowd = [bench.generate(some_tokens(10), user=1) for _ in range(4)]
    other = bench.generate(some_tokens(10), user=2)
    newcomer = bench.generate(some_tokens(10), user=3)
    assert bench.failure(crowd[3]).kind == "Busy"
    again = bench.generate(some_tokens(10), user=2)
    assert bench.failure(crowd[2]).kind == "Busy"
    own = bench.generate(some_tokens(10), user=1)
    equals = bench.generate(some_tokens(10), user=3)  # with it three users would have two each
    assert [bench.failure(job).kind for job in (own, equals)] == ["Busy"] * 2
    bench.finish()
    assert all(bench.end(job) == "length" for job in (running, *crowd[:2], other, newcomer, again))


def test_a_flood_fills_the_room_and_others_still_get_in(models: Models) -> None:
    bench = Bench(models, running=1, waiting=4)
    first = bench.generate(some_tokens(10), count=30, user=1)
    bench.work()
    flood = [bench.generate(some_tokens(10), user=1) for _ in range(6)]
    assert [bench.failure(job).kind for job in flood[4:]] == ["Busy"] * 2
    light = bench.generate(some_tokens(10), user=2)
    assert bench.failure(flood[3]).retry_after >= 1
    bench.finish()
    assert [bench.end(job) for job in (first, *flood[:3], light)] == ["length"] * 5


def test_who_waited_too_long_is_told_and_who_runs_is_not(models: Models) -> None:
    clock = Clock()
    bench = Bench(models, running=1, patience=5.0, clock=clock)
    running = bench.generate(some_tokens(10), count=30, user=1)
    bench.work(3)
    late = bench.generate(some_tokens(10), user=2)
    clock.now = 4.0
    bench.work()
    later = bench.generate(some_tokens(10), user=3)
    clock.now = 6.0
    bench.work()
    assert bench.failure(late).kind == "Busy"
    assert later not in bench.answers
    bench.finish()
    assert [bench.end(job) for job in (running, later)] == ["length"] * 2


def test_who_could_not_be_served_in_time_is_refused_at_once(models: Models) -> None:
    clock = Clock()
    bench = Bench(models, running=1, patience=10.0, clock=clock)
    jobs = [bench.generate(some_tokens(10), count=1, user=user) for user in range(1, 21)]
    for _ in range(9):
        clock.now += 1.0
        bench.work()
    assert bench.health().waiting == 11
    refused = bench.failure(bench.generate(some_tokens(10), user=30))
    assert (refused.kind, refused.retry_after) == ("Busy", 11)
    assert "11 seconds" in refused.message
    clock.now += 1.0
    bench.work(2)
    fits = bench.generate(some_tokens(10), count=1, user=31)
    bench.finish()
    assert bench.end(fits) == "length"
    assert all(bench.end(job) == "length" for job in jobs)


def test_a_pause_says_nothing_of_the_pace_of_a_later_crowd(models: Models) -> None:
    """Those who waited last gave up: nobody was the last to be admitted."""
    clock = Clock()
    bench = Bench(models, running=1, patience=10.0, clock=clock)
    crowd = [bench.generate(some_tokens(10), count=1, user=user) for user in range(1, 13)]
    for _ in range(10):
        clock.now += 0.1
        bench.work()
    for job in crowd:
        bench.abort(job)
    bench.finish()
    clock.now += 3600
    some = [bench.generate(some_tokens(10), count=3, user=user) for user in (40, 41)]
    bench.work()
    some.append(bench.generate(some_tokens(10), count=3, user=42))
    bench.finish()
    assert [bench.end(job) for job in some] == ["length"] * 3
