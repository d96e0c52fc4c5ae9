"""The serving face: what every engine promises of replies, scores and health."""

import asyncio
import math
from pathlib import Path

import pytest
from house import House

from persona.engine import adapter_file
from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    GenerateRequest,
    Health,
    PrefillRequest,
    Sampling,
    ScoreRequest,
)
from persona.errors import AdapterError, RequestError

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = [10, 20, 30, 40, 50]


async def reply(house: House, count: int = 6, adapter: AdapterRef | None = None, **options: object) -> list[Chunk]:
    request = GenerateRequest(PROMPT, Sampling(max_tokens=count, **options), adapter)  # type: ignore[arg-type]
    return [chunk async for chunk in house.engine.generate(request)]


async def at_rest(house: House) -> Health:
    """The engine's health once nothing runs any more."""
    async with asyncio.timeout(30):
        while True:
            health = await house.engine.health()
            if not health.running and not health.waiting:
                return health
            await asyncio.sleep(0.05)


async def test_the_last_chunk_and_only_it_says_how_the_reply_ended(house: House) -> None:
    chunks = await reply(house)
    assert [chunk.finish for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish in ("stop", "length")
    assert chunks[-1].error is None


async def test_the_count_of_tokens_grows_up_to_the_limit(house: House) -> None:
    counts = [chunk.tokens for chunk in await reply(house, 5)]
    assert counts == sorted(counts)
    assert 1 <= counts[-1] <= 5


async def test_a_reply_that_reaches_its_limit_says_length(house: House) -> None:
    assert (await reply(house, 2))[-1].finish == "length"


async def test_a_reply_that_ignores_the_end_of_text_reaches_its_limit(house: House) -> None:
    last = (await reply(house, 40, ignore_eos=True))[-1]
    assert (last.finish, last.tokens) == ("length", 40)


async def test_equal_requests_get_equal_greedy_replies(house: House) -> None:
    first, second = (await reply(house), await reply(house))
    assert "".join(c.text for c in first) == "".join(c.text for c in second) != ""


async def test_what_is_prefilled_changes_no_reply(house: House) -> None:
    ref = house.ref(user := house.user())
    request = GenerateRequest([*PROMPT * 20, 7], Sampling(max_tokens=6), ref, user)
    before = [chunk.text async for chunk in house.engine.generate(request)]
    await house.engine.prefill(PrefillRequest(PROMPT * 20, ref, user))
    assert [chunk.text async for chunk in house.engine.generate(request)] == before


async def test_a_corrupt_version_prefills_nothing(house: House) -> None:
    ref = house.ref(user := house.user())
    file = Path(ref.path) / adapter_file.FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError):
        await house.engine.prefill(PrefillRequest(PROMPT, ref, user))


async def test_many_replies_run_at_once_and_each_ends(house: House) -> None:
    ended = await asyncio.gather(*(reply(house) for _ in range(6)))
    assert len({"".join(c.text for c in chunks) for chunks in ended}) == 1


async def test_closing_the_iterator_aborts_and_frees_the_pages(house: House) -> None:
    free = (await at_rest(house)).free_pages
    stream = house.engine.generate(GenerateRequest(PROMPT, Sampling(max_tokens=900)))
    chunk = await anext(stream)
    assert chunk.finish is None
    await stream.aclose()  # type: ignore[attr-defined]
    health = await at_rest(house)
    assert health.free_pages == free


async def test_leaving_before_the_first_chunk_frees_the_pages_too(house: House) -> None:
    free = (await at_rest(house)).free_pages
    task = asyncio.create_task(reply(house, 900))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await at_rest(house)).free_pages == free


@pytest.mark.parametrize("targets", [[1], [4], [1, 2, 3, 4], [2, 4], []])
async def test_a_score_has_one_logarithm_of_a_probability_per_target(house: House, targets: list[int]) -> None:
    found = await house.engine.score(ScoreRequest(PROMPT, targets))
    assert len(found) == len(targets)
    assert all(math.isfinite(value) and value <= 0 for value in found)


@pytest.mark.parametrize("targets", [[0], [5], [3, 2], [2, 2], [-1]])
async def test_targets_that_do_not_ascend_inside_the_tokens_are_refused(house: House, targets: list[int]) -> None:
    with pytest.raises(RequestError, match="ascend"):
        await house.engine.score(ScoreRequest(PROMPT, targets))


async def test_what_is_told_of_a_prompt_are_its_scores_with_alternatives(house: House) -> None:
    request = ScoreRequest(PROMPT, [1, 3, 4], house.ref(house.user()), top=3)
    told = await house.engine.tell(request)
    assert [one.token for one in told] == [20, 40, 50]
    assert [one.logprob for one in told] == pytest.approx(await house.engine.score(request), abs=0.05)
    for one in told:
        assert len(one.top) == 3
        assert [value for _, value in one.top] == sorted((value for _, value in one.top), reverse=True)
    assert [one.top for one in await house.engine.tell(ScoreRequest(PROMPT, [1, 2]))] == [[], []]
    assert await house.engine.tell(ScoreRequest(PROMPT, [])) == []


async def test_a_reply_tells_of_its_tokens_if_asked(house: House) -> None:
    told = [one for chunk in await reply(house, 4, logprobs=2) for one in chunk.logprobs]
    assert len(told) == 4
    assert all(math.isfinite(one.logprob) and one.logprob <= 0 and len(one.top) == 2 for one in told)
    assert [one for chunk in await reply(house, 4) for one in chunk.logprobs] == []


async def test_scores_reach_an_adapter_that_was_never_staged(house: House) -> None:
    assert len(await house.engine.score(ScoreRequest(PROMPT, [1, 2], house.ref(house.user())))) == 2


async def test_scores_of_many_come_in_their_order(house: House) -> None:
    ref = house.ref(house.user())
    asked = [
        ScoreRequest(PROMPT, [1, 4]),
        ScoreRequest(PROMPT, []),
        ScoreRequest(PROMPT[:3], [2], ref),
        ScoreRequest(PROMPT, [4]),
    ]
    found = await house.engine.score_all(asked)
    assert [len(values) for values in found] == [2, 0, 1, 1]
    alone = [await house.engine.score(request) for request in asked]
    assert all(value == pytest.approx(other, abs=0.05) for value, other in zip(found, alone, strict=True))
    assert await house.engine.score_all([]) == []


@pytest.mark.parametrize("targets", [[0], [5], [3, 2]])
async def test_one_bad_request_among_many_is_refused_and_none_is_scored(house: House, targets: list[int]) -> None:
    with pytest.raises(RequestError, match="ascend"):
        await house.engine.score_all([ScoreRequest(PROMPT, [1]), ScoreRequest(PROMPT, targets)])


async def test_scores_of_many_on_a_missing_adapter_are_an_adapter_error(house: House) -> None:
    missing = AdapterRef(house.user(), 1, str(house.folder / "nowhere"), "0" * 64)
    with pytest.raises(AdapterError):
        await house.engine.score_all([ScoreRequest(PROMPT, [1], missing)])


async def test_leaving_a_scoring_of_many_frees_the_engine(house: House) -> None:
    task = asyncio.create_task(house.engine.score_all([ScoreRequest(PROMPT, [1, 2])] * 200))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await reply(house))[-1].finish


async def test_an_empty_prompt_is_refused(house: House) -> None:
    with pytest.raises(RequestError, match="empty"):
        await anext(house.engine.generate(GenerateRequest([])))


async def test_a_reply_on_a_missing_adapter_is_an_adapter_error(house: House) -> None:
    with pytest.raises(AdapterError):
        await reply(house, adapter=AdapterRef(house.user(), 1, str(house.folder / "nowhere"), "0" * 64))
    assert (await reply(house))[-1].finish


async def test_health_names_the_base_and_the_context(house: House) -> None:
    health = await house.engine.health()
    assert health.base
    assert health.model
    assert health.context > 0
