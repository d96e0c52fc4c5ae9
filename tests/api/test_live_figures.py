"""What the live check found, as its user, the owner and Prometheus see it; and a version that is really bad."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import adapters
import pytest
import structlog
from live import Live, Start
from models import Models

from persona.domain import EntryId, User, Version
from persona.engine.client import LocalEngine
from persona.engine.prepare import Prepared
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.engine.shape import Shape
from persona.engine.text import Text
from persona.settings import Settings

OFTEN: dict[str, Any] = {"learning": {"check_seconds": 0.05}}
CANARY = "canary-77b0"
Write = Callable[[Path, int, int], None]


def plain(place: Path, user: int, number: int) -> None:
    Path(place, "adapter.safetensors").write_bytes(b"weights %d %d" % (user, number))


async def publish(live: Live, user: User, before: int, write: Write = plain) -> Version:
    """Put a version into service by force, as if a run had been kept."""
    services = live.services
    folder, last = await services.adapters.workspace(user.id), await services.history.last_id(user.id)
    write(folder, user.id, before + 1)
    version = await services.adapters.publish(
        user.id,
        folder,
        watermark=EntryId(last),
        parent=before or None,
        base=services.base(),
        run_id=None,
        metrics={"through": last, "before": before},
        plan={},
    )
    await services.adapters.point(user.id, version.number)
    return version


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.02)


async def talk(live: Live, count: int, user: str = "ann") -> None:
    lines = [json.dumps({"ts": 1_700_000_000 + n, "text": f"{CANARY} and message {_word(n)}"}) for n in range(count)]
    headers = {"Content-Type": "application/x-ndjson"}
    await live.call("POST", "/v1/me/history", user=user, data="\n".join(lines).encode(), headers=headers)


def _word(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:03}")


async def versions(live: Live, user: str = "ann") -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = (await live.call("GET", "/v1/me/versions", user=user))["data"]
    return data


async def report(live: Live, path: str = "/admin/live") -> dict[str, Any]:
    async with live.admin.get(path) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


def scores(losses: dict[int, float]) -> Callable[[ScoreRequest], list[float]]:
    return lambda request: [-losses[request.adapter.number if request.adapter else 0]] * len(request.targets)


async def test_threat_10_a_version_published_by_force_is_rolled_back_and_everybody_sees_why(start: Start) -> None:
    live = await start(ScriptedEngine(score=scores({0: 3.0, 1: 2.0, 2: 2.4})), **OFTEN)
    user = await live.user()
    with structlog.testing.capture_logs() as logged:
        await publish(live, user, 0)
        await publish(live, user, 1)
        await talk(live, 40)

        async def back() -> bool:
            return (await live.call("GET", "/v1/me"))["version"] == 1

        await until(back)
    first, second = await versions(live)
    assert second["rolled_back"].startswith("Rolled back by the live check: -0.400 nats per token against version 1")
    assert (first["active"], first["rolled_back"]) == (True, None)
    shown = second["live"]
    assert (shown["against"], shown["verdict"]) == (1, "worse")
    assert shown["gain"] == pytest.approx(-0.4)
    assert shown["interval"][0] < -0.4 < shown["interval"][1] < 0
    assert (await live.say("hello"))["model"] == "persona"
    assert live.engine.requests[-1].adapter.number == 1  # type: ignore[union-attr]
    (line,) = [line for line in logged if "live check" in line["event"]]
    assert (line["version"], line["to"]) == (2, 1)
    assert CANARY not in str(logged)
    (item,) = [item for item in (await report(live))["data"] if item["version"] == 2]
    assert (item["user"], item["active"], item["rolled_back"]) == ("ann", False, second["rolled_back"])
    page = await (await live.admin.get("/metrics")).text()
    assert f'persona_live_checks_total{{what="messages"}} {live.services.live.counts["messages"]}.0' in page
    assert 'persona_live_checks_total{what="rollbacks"} 1.0' in page


async def test_the_report_is_about_everybody_or_one_user(start: Start) -> None:
    live = await start(ScriptedEngine(score=scores({0: 3.0, 1: 2.0})), **OFTEN)
    assert await report(live) == {"object": "list", "enabled": True, "data": []}
    for name in ("ann", "bob"):
        await publish(live, await live.user(name), 0)
        await talk(live, 12, name)

    async def all_checked() -> bool:
        return [item["messages"] for item in (await report(live))["data"]] == [12, 12]

    await until(all_checked)
    data = (await report(live, "/admin/live?user=bob"))["data"]
    assert [(item["user"], item["version"], item["against"], item["verdict"]) for item in data] == [
        ("bob", 1, 0, "better")
    ]
    async with live.admin.get("/admin/live?user=cem") as answer:
        assert answer.status == 404
    async with live.http.get("/admin/live", headers={"Authorization": f"Bearer {await live.key()}"}) as answer:
        assert answer.status == 404
    assert [version["live"]["messages"] for version in await versions(live, "bob")] == [12]


async def test_threat_32_who_is_forgotten_while_checked_leaves_no_figures(start: Start) -> None:
    class Slow(ScriptedEngine):
        async def score(self, request: ScoreRequest) -> list[float]:
            await asyncio.sleep(0.05)
            return await super().score(request)

    live = await start(Slow(score=scores({0: 3.0, 1: 2.0})), **OFTEN)
    user = await live.user()
    await publish(live, user, 0)
    await talk(live, 20)

    async def begun() -> bool:
        return bool((await report(live))["data"])

    await until(begun)
    receipt = await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
    assert receipt["live_checks"] > 0
    asked = len(live.engine.scored)
    await asyncio.sleep(0.3)
    assert len(live.engine.scored) == asked
    assert (await report(live))["data"] == []


def noise(prepared: Prepared) -> Write:
    shape = Shape.read(prepared.folder)

    def write(place: Path, user: int, number: int) -> None:
        adapters.sparse(place, shape, prepared.base, user=user, number=number, size=0.6)

    return write


@pytest.fixture
async def tiny(
    start: Start, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Live, Write]]:
    """The service over a real engine process with a tiny model, and what writes adapters of noise for it."""
    prepared = Models(tmp_path_factory.getbasetemp() / "models").prepared()
    sections: Any = {"model": {"device": "cpu"}, "engine": {"context": 1024, "memory_mb": 64, "threads": 1}}
    changed = {name: {**settings.model_dump()[name], **values} for name, values in sections.items()}
    engine = LocalEngine(Settings.model_validate({**settings.model_dump(), **changed}), prepared)
    await engine.start()
    try:
        live = await start(engine, tokenizer=Text.load(prepared.folder), prepared=prepared, **sections, **OFTEN)
        yield live, noise(prepared)
    finally:
        await engine.stop()


async def test_threat_10_a_real_adapter_of_noise_gives_way_to_the_base(tiny: tuple[Live, Write]) -> None:
    live, write = tiny
    await publish(live, await live.user(), 0, write)
    await talk(live, 60)

    async def back() -> bool:
        return (await live.call("GET", "/v1/me"))["version"] is None

    await until(back)
    (version,) = await versions(live)
    assert "against the bare base" in version["rolled_back"]
    assert version["live"]["gain"] < 0
    assert (await live.say("hello", max_tokens=4))["usage"]["completion_tokens"] == 4
