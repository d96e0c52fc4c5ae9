"""The versions face: a version is served as a whole or refused as a whole, and a running reply keeps its own."""

from pathlib import Path

import pytest
from house import House

from persona.engine import adapter_file
from persona.engine.protocol import AdapterRef, GenerateRequest, Sampling
from persona.errors import AdapterError

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROMPT = [10, 20, 30, 40, 50]


async def text(house: House, ref: AdapterRef | None) -> str:
    request = GenerateRequest(PROMPT, Sampling(max_tokens=8), ref)
    return "".join([chunk.text async for chunk in house.engine.generate(request)])


async def test_a_version_that_was_staged_and_flipped_serves(house: House) -> None:
    ref = house.ref(house.user())
    await house.engine.stage(ref)
    await house.engine.flip(ref)
    assert await text(house, ref) != await text(house, None)


async def test_staging_twice_is_staging_once(house: House) -> None:
    ref = house.ref(house.user())
    await house.engine.stage(ref)
    before = (await house.engine.health()).resident
    await house.engine.stage(ref)
    assert (await house.engine.health()).resident == before


async def test_threat_06_a_corrupt_version_is_refused_and_changes_nothing(house: House) -> None:
    user = house.user()
    good, bad = house.ref(user, 1), house.ref(user, 2)
    await house.engine.stage(good)
    before = ((await house.engine.health()).resident, await text(house, good))
    file = Path(bad.path) / adapter_file.FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError):
        await house.engine.stage(bad)
    assert ((await house.engine.health()).resident, await text(house, good)) == before


async def test_a_missing_version_is_refused_and_changes_nothing(house: House) -> None:
    before = (await house.engine.health()).resident
    with pytest.raises(AdapterError):
        await house.engine.stage(AdapterRef(house.user(), 1, str(house.folder / "nowhere"), "0" * 64))
    assert (await house.engine.health()).resident == before


async def test_a_foreign_version_is_refused_and_changes_nothing(house: House) -> None:
    before = (await house.engine.health()).resident
    with pytest.raises(AdapterError):
        await house.engine.stage(house.foreign(house.ref(house.user())))
    assert (await house.engine.health()).resident == before


async def test_threat_08_a_running_reply_ends_on_its_version_across_flip_and_drop(house: House) -> None:
    user = house.user()
    old, new = house.ref(user, 1), house.ref(user, 2)
    wanted = await text(house, old)
    assert await text(house, new) != wanted
    stream = house.engine.generate(GenerateRequest(PROMPT, Sampling(max_tokens=8), old))
    shown = (await anext(stream)).text
    await house.engine.stage(new)
    await house.engine.flip(new)
    await house.engine.drop(user)
    shown += "".join([chunk.text async for chunk in stream])
    assert shown == wanted


async def test_a_dropped_version_can_be_named_again(house: House) -> None:
    ref = house.ref(house.user())
    wanted = await text(house, ref)
    await house.engine.drop(ref.user_id)
    assert await text(house, ref) == wanted


async def test_dropping_somebody_unknown_is_no_error(house: House) -> None:
    await house.engine.drop(house.user())
