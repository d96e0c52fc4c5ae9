"""The whole story on the embedded model, with two real people: chat, import, learn, swap under a stream, be known.

Real HTTP, real SQLite, the real engine process and its real weights. What is measured is held-out loss per token on
each person's last messages, which nothing has trained on.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from models import embedded

from persona import app, frames
from persona.domain import Line, Version, VersionState
from persona.engine.protocol import AdapterRef, ScoreRequest, ref
from persona.settings import Settings

DATA = Path(__file__).parent / "data"
PEOPLE = {"willis": "dr_willis.jsonl", "eric": "eric.jsonl"}
IMPORTED = 400  # of 420 messages; the gate holds out the newest of them
TESTED = 40  # the last messages of each file
MARGIN = 0.05  # nats per token by which the own adapter has to win
LEARNING = {"max_run_tokens": 20_000, "check_seconds": 3600.0}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[app.House]:
    embedded(Settings())
    settings = Settings.model_validate({"home": tmp_path, "http": {"port": 0}, "learning": LEARNING})
    async with app.build(settings) as house:
        yield house


class Person:
    """One user of the service, with their key and their file."""

    def __init__(self, house: app.House, name: str, key: str) -> None:
        self.name, self._house = name, house
        self.lines = (DATA / PEOPLE[name]).read_text(encoding="utf-8").splitlines()
        self.client = openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0)
        self._headers = {"Authorization": f"Bearer {key}"}

    @classmethod
    async def join(cls, house: app.House, name: str) -> "Person":
        user = await house.services.users.add(name)
        _, key = await house.services.users.add_key(user.id)
        return cls(house, name, key)

    async def post(self, path: str, **options: Any) -> Any:
        async with (
            aiohttp.ClientSession(self._house.url, headers=self._headers) as http,
            http.post(path, **options) as answer,
        ):
            assert answer.status < 300, await answer.text()
            return await answer.json()

    async def ask(self, text: str, **options: Any) -> tuple[str, set[int | None]]:
        """The streamed reply and every version that its chunks name."""
        stream = await self.client.chat.completions.create(
            model="persona", messages=[{"role": "user", "content": text}], stream=True, temperature=0, **options
        )
        said, versions = "", set()
        async for chunk in stream:
            versions.add(chunk.system_fingerprint)
            said += "".join(choice.delta.content or "" for choice in chunk.choices)
        return said, versions

    async def version(self) -> Version | None:
        user = await self._house.services.users.get(self.name)
        assert user is not None
        return await self._house.services.adapters.active(user.id)

    async def loss(self, adapter: AdapterRef | None) -> float:
        """Nats per token of this person's last messages, drafted by the base with `adapter`."""
        services = self._house.services
        nats = tokens = 0.0
        for line in self.lines[-TESTED:]:
            item = json.loads(line)
            said = [Line(**heard) for heard in item["context"]]
            said = frames.trim_lines(said, services.settings.learning.context_tokens, services.tokenizer)
            framed = frames.draft(said, item["text"], tokenizer=services.tokenizer)
            scores = await services.engine.score(ScoreRequest(framed.tokens, framed.targets, adapter))
            nats, tokens = nats - sum(scores), tokens + len(scores)
        return nats / tokens


async def learn(house: app.House, person: Person) -> tuple[dict[str, Any], list[tuple[str, set[int | None]]]]:
    """Train one person to the end, with streams open from the moment there is a candidate until it serves."""
    services = house.services
    user = await services.users.get(person.name)
    assert user is not None
    run = await person.post("/v1/me/train")
    replies = []
    while not (ended := await services.runs.get(user.id, run["id"])).state.ended:  # type: ignore[union-attr]
        versions = await services.adapters.list(user.id)
        if any(version.state is VersionState.CANDIDATE for version in versions):
            replies.append(await person.ask("Which file lists the file systems?", max_tokens=96))
        else:
            await asyncio.sleep(0.2)
    assert ended is not None
    return {"id": ended.id, "state": ended.state.value, "reason": ended.reason, **ended.metrics}, replies


async def test_two_people_chat_are_learned_and_each_adapter_fits_its_own_person_best(house: app.House) -> None:
    async with AsyncExitStack() as stack:
        people = [await Person.join(house, name) for name in PEOPLE]
        for person in people:
            stack.push_async_callback(person.client.close)
        await tell(house, people)


async def tell(house: app.House, people: list[Person]) -> None:
    adapters: dict[str, AdapterRef] = {}
    for person in people:
        reply, before = await person.ask("Name the capital of France.", max_tokens=24)
        assert "Paris" in reply
        imported = await person.post("/v1/me/history", data="\n".join(person.lines[:IMPORTED]).encode())
        assert imported["stored"] == IMPORTED
        run, replies = await learn(house, person)
        assert run["state"] == "kept", run
        assert all(len(versions) == 1 for _, versions in replies), "a reply mixed versions"
        assert replies[0][1] == before, "a stream that began before the flip stays on the version it began with"
        _, after = await person.ask("And of Italy?", max_tokens=8)
        assert after != before
        version = await person.version()
        assert version is not None
        assert (version.parent, version.run_id) == (None, run["id"])
        assert version.bytes <= 500_000
        adapters[person.name] = ref(version)
    for person, other in (people, people[::-1]):
        base, own, foreign = [
            await person.loss(adapter) for adapter in (None, adapters[person.name], adapters[other.name])
        ]
        assert own < base - MARGIN, (person.name, base, own, foreign)
        assert own < foreign - MARGIN, (person.name, base, own, foreign)
