"""The prefix cache: what was computed is not computed again, and nobody reads what is another's or out of date."""

from pathlib import Path

import adapters
import pytest
from models import Models
from plain import some_tokens
from workbench import PAGE, Bench

from persona.engine import protocol
from persona.engine.pages import PagePool
from persona.engine.prefix import Owner, PrefixCache
from persona.engine.protocol import AdapterRef

SIZE = 4
OWNERS = [
    Owner(user, ref) for user in (1, 2) for ref in (None, AdapterRef(user, 1, "a", "1"), AdapterRef(user, 2, "b", "2"))
]


def fill(cache: PrefixCache, owner: Owner, tokens: list[int], *others: list[int]) -> None:
    """A sequence comes, computes all of `tokens` and goes. others: pages that somebody else has meanwhile."""
    chain = cache.match(owner, tokens)
    pages = cache.take(chain, cache.pool.needed(len(tokens)) - len(chain))
    assert pages is not None
    while pages and (len(chain) + 1) * SIZE <= len(tokens):
        start = len(chain) * SIZE
        block = cache.keep(owner, chain[-1] if chain else None, tuple(tokens[start : start + SIZE]), pages.pop(0))
        assert block is not None
        chain.append(block)
    cache.release(chain)
    cache.pool.give(pages)
    cache.check([], others)


def found(cache: PrefixCache, owner: Owner, tokens: list[int]) -> int:
    return len(cache.match(owner, tokens)) * SIZE


def test_full_pages_are_found_and_one_token_is_left_to_compute() -> None:
    cache = PrefixCache(PagePool(20, SIZE))
    text = list(range(12))
    fill(cache, OWNERS[0], text)
    assert found(cache, OWNERS[0], [*text, 99]) == 12
    assert found(cache, OWNERS[0], text) == 8
    assert found(cache, OWNERS[0], [*text[:7], 99, 98]) == 4
    assert found(cache, OWNERS[0], [99, *text]) == 0


@pytest.mark.parametrize("way", ["forgotten", "wanted"])
def test_a_text_of_any_length_leaves_whole(way: str) -> None:
    """8,000 tokens in blocks of four: a chain longer than Python nests calls."""
    pool = PagePool(2000, SIZE)
    cache = PrefixCache(pool, quota=1.0)
    fill(cache, OWNERS[0], list(range(8000)))
    assert cache.idle_pages == 2000
    if way == "forgotten":
        cache.forget(lambda owner: True)
    else:
        assert pool.take_run(2000, ()) == list(range(2000))
        pool.give(list(range(2000)))
    assert (cache.idle_pages, pool.available, found(cache, OWNERS[0], list(range(9)))) == (0, 2000, 0)
    cache.check([], [])


@pytest.mark.parametrize("other", OWNERS[1:])
def test_another_user_or_version_finds_nothing(other: Owner) -> None:
    cache = PrefixCache(PagePool(20, SIZE))
    fill(cache, OWNERS[0], list(range(12)))
    assert found(cache, other, list(range(13))) == 0


def test_the_longest_unused_leave_and_never_what_is_before_a_used_one() -> None:
    cache = PrefixCache(PagePool(6, SIZE), quota=1.0)
    fill(cache, OWNERS[0], [1, 1, 1, 1, 2, 2, 2, 2])
    fill(cache, OWNERS[0], [5, 5, 5, 5])
    fill(cache, OWNERS[0], [1, 1, 1, 1, 3, 3, 3, 3])  # uses the first block again
    fill(cache, OWNERS[1], [9] * 12)  # wants three pages: two are free
    assert found(cache, OWNERS[0], [1, 1, 1, 1, 2, 2, 2, 2, 0]) == 4  # its second block was the longest unused
    assert found(cache, OWNERS[0], [5, 5, 5, 5, 0]) == 4
    assert found(cache, OWNERS[0], [1, 1, 1, 1, 3, 3, 3, 3, 0]) == 8


def test_one_user_cannot_crowd_out_another() -> None:
    cache = PrefixCache(PagePool(16, SIZE), quota=0.25)
    fill(cache, OWNERS[0], [7] * 8)
    for number in range(100):
        fill(cache, Owner(3, None), [number] * 12)
    assert found(cache, OWNERS[0], [7] * 9) == 8
    assert cache.idle_pages == 2 + 4


def test_what_cannot_be_had_changes_nothing() -> None:
    cache = PrefixCache(PagePool(4, SIZE), quota=1.0)
    fill(cache, OWNERS[0], [1] * 8)
    chain = cache.match(OWNERS[0], [1] * 9)
    assert cache.take(chain, 3) is None  # two are free, and the two idle ones are the chain itself
    assert found(cache, OWNERS[0], [1] * 9) == 8
    cache.check([], [])


def test_a_block_that_leaves_for_its_place_takes_along_what_stands_behind_it() -> None:
    cache = PrefixCache(PagePool(6, SIZE), quota=1.0)
    used = cache.pool.take(4)
    assert used is not None
    fill(cache, OWNERS[0], [1] * 4, used)  # into page 4
    cache.pool.give([used.pop(0)])
    fill(cache, OWNERS[0], [*[1] * 4, *[2] * 4], used)  # behind it, into page 0
    assert found(cache, OWNERS[0], [*[1] * 4, *[2] * 4, 3]) == 8
    run = cache.pool.take_run(2)
    assert run == [4, 5]
    assert found(cache, OWNERS[0], [*[1] * 4, *[2] * 4, 3]) == 0
    assert cache.pool.free == 1
    cache.check([], [used, run])


# --- in the engine


@pytest.fixture
def bench(models: Models) -> Bench:
    return Bench(models)


def health(bench: Bench) -> tuple[int, int]:
    now = bench.health()
    return now.prompt_tokens, now.cached_tokens


def test_a_second_turn_computes_only_what_is_new_and_says_the_same(bench: Bench, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=7)
    first = some_tokens(50, seed=1)
    bench.alone(first, ref, user=7)
    second = [*first, *some_tokens(20, seed=2)]
    expected = bench.alone(second, ref)  # nobody's: nothing is looked up
    assert health(bench) == (50, 0)
    assert bench.alone(second, ref, user=7) == expected
    assert health(bench) == (120, 48)


def test_words_of_the_reply_are_found_in_the_next_prompt(bench: Bench) -> None:
    prompt = some_tokens(8, seed=1)
    job = bench.generate(prompt, count=20, user=7)
    bench.finish()
    assert bench.end(job) == "length"
    assert bench.health().cached_pages == 3  # 8 of the prompt and 19 of the reply: the last token was not computed


def test_another_users_equal_prompt_is_computed_anew(bench: Bench) -> None:
    prompt = some_tokens(50, seed=1)
    bench.alone(prompt, user=7)
    bench.alone(prompt, user=8)
    assert health(bench) == (100, 0)


def test_a_flip_and_a_drop_leave_nothing_of_what_was(bench: Bench, tmp_path: Path) -> None:
    old = adapters.sparse(tmp_path / "old", bench.shape, bench.prepared.base, user=7)
    new = adapters.sparse(tmp_path / "new", bench.shape, bench.prepared.base, user=7, number=2)
    prompt = some_tokens(50, seed=1)
    bench.alone(prompt, old, user=7)
    running = bench.generate(prompt, old, count=30, user=7)
    bench.work(3)
    bench.ask(lambda job: protocol.Flip(job, new))
    expected = bench.alone(prompt, new)
    assert bench.alone(prompt, new, user=7) == expected
    assert bench.end(running) == "length"
    assert not bench.scheduler.prefix.match(Owner(7, old), prompt)
    assert bench.scheduler.prefix.match(Owner(7, new), prompt)
    bench.ask(lambda job: protocol.Drop(job, 7))
    assert bench.health().cached_pages == 0
    assert bench.scheduler.pool.free == bench.scheduler.pool.total


def test_a_reply_that_runs_on_after_a_drop_leaves_nothing(bench: Bench) -> None:
    prompt = some_tokens(5, seed=1)
    running = bench.generate(prompt, count=40, user=7)
    bench.work(2)
    bench.ask(lambda job: protocol.Drop(job, 7))
    bench.finish()
    assert bench.end(running) == "length"
    assert bench.health().cached_pages == 0


def ahead(bench: Bench, tokens: list[int], ref: AdapterRef, user: int = 7) -> int:
    return bench.ask(lambda job: protocol.Prefill(job, protocol.PrefillRequest(tokens, ref, user)))


def test_what_a_staged_version_was_given_beforehand_is_there_after_the_flip(bench: Bench, tmp_path: Path) -> None:
    new = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=7, number=2)
    talk = some_tokens(50, seed=1)
    expected = bench.alone([*talk, 5, 6], new)
    bench.ask(lambda job: protocol.Stage(job, new))
    job = ahead(bench, talk, new)
    bench.finish()
    assert bench.answers[job] == [protocol.Done(job)]
    bench.ask(lambda job: protocol.Flip(job, new))
    assert bench.alone([*talk, 5, 6], new, user=7) == expected
    assert health(bench) == (50 + 52, 48)
    assert bench.alone([*talk, 5, 6], new, user=8) == expected  # and nobody else finds it
    assert health(bench) == (50 + 52 + 52, 48)


def test_what_is_computed_for_later_waits_until_nobody_waits(bench: Bench, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=7)
    reply = bench.generate(some_tokens(9), count=30)
    bench.work(2)
    job = ahead(bench, some_tokens(100, seed=1), ref)
    while not bench.end(reply):
        bench.work(1)
        assert job not in bench.answers
        assert bench.health().cached_pages == 0
    newcomer = bench.generate(some_tokens(9), count=2)
    bench.work(2)
    assert bench.end(newcomer) == "length"
    bench.finish()
    assert bench.answers[job] == [protocol.Done(job)]


def test_what_is_computed_for_later_may_be_given_up_at_any_moment(bench: Bench, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=7)
    talk = some_tokens(200, seed=1)
    job = ahead(bench, talk, ref)
    bench.work(2)
    bench.ask(lambda _: protocol.Abort(job))
    bench.finish()
    bench.loop.check()
    assert [type(answer) for answer in bench.answers[job]] == [protocol.Failed]
    kept = bench.health().cached_pages
    assert 0 < kept < 200 // 8  # what was computed stays


def test_cached_beginnings_give_way_to_a_request_that_needs_their_pages(models: Models) -> None:
    bench = Bench(models, pages=12)
    for user in range(1, 6):
        bench.alone(some_tokens(40, seed=user), user=user)
    assert bench.health().cached_pages > 5
    long = some_tokens(80, seed=9)
    assert bench.end(bench.generate(long, count=8, user=9)) is None
    bench.finish()
    assert bench.alone(long, count=8, user=9) == bench.alone(long, count=8)


def test_two_who_compute_the_same_at_once_share_what_the_first_left(bench: Bench) -> None:
    prompt = some_tokens(50, seed=1)
    jobs = [bench.generate(prompt, user=7) for _ in range(3)]
    bench.finish()
    assert len({bench.text(job) for job in jobs}) == 1
    bench.scheduler.prefix.check([], [])
    assert bench.health().cached_pages == (50 + 12 - 1) // PAGE  # once, not three times
    bench.alone(prompt, user=7)
    assert bench.health().cached_tokens == 48


def test_not_finite_values_of_one_version_reach_no_other(bench: Bench, tmp_path: Path) -> None:
    bad = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=7, alpha=1e36, size=100.0)
    prompt = some_tokens(50, seed=1)
    expected = bench.alone(prompt)
    job = bench.generate(prompt, bad, user=7)
    bench.finish()
    assert bench.end(job) == "error"
    assert bench.alone(prompt, user=7) == expected
    assert bench.alone(some_tokens(120, seed=3), user=8, count=40) == bench.alone(some_tokens(120, seed=3), count=40)
