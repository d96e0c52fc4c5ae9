"""Clients that leave, disks that fill, versions that change: what was said is kept, and nothing goes on unheard."""

import asyncio
import json
from typing import Any

import pytest
from live import Live, Start
from manager import Manager

from persona.app_watch import watching
from persona.engine.scripted import ScriptedEngine
from persona.notify import Supervisor

BODY: dict[str, Any] = {"model": "persona", "messages": [{"role": "user", "content": "talk"}]}


def talkative() -> ScriptedEngine:
    return ScriptedEngine(" ".join(f"word{number}" for number in range(500)), delay=0.01)


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.01)


async def leave_after(live: Live, content: bytes, *, stream: bool) -> None:
    """Ask, read until `content` has come, and cut the connection."""
    body = json.dumps({**BODY, "stream": stream}).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {await live.key()}",
        f"Content-Length: {len(body)}",
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    if content:
        await reader.readuntil(content)
    else:
        await until(lambda: live.engine.requests)
    writer.transport.abort()
    await asyncio.sleep(0)


@pytest.mark.parametrize(("stream", "content"), [(True, b"word3"), (True, b""), (False, b"")])
async def test_threat_18_a_client_that_leaves_ends_the_generation(start: Start, stream: bool, content: bytes) -> None:
    live = await start(talkative())
    await leave_after(live, content, stream=stream)
    await until(lambda: live.engine.aborted == 1)
    await until(lambda: not live.services.chat.running)
    async with live.http.get("/metrics") as answer:
        assert 'persona_replies_total{finish="abort"} 1.0' in await answer.text()


async def test_threat_18_after_the_client_left_the_engine_does_not_take_another_step(start: Start) -> None:
    taken: list[int] = []

    class Counting(ScriptedEngine):
        async def generate(self, request: Any) -> Any:
            async for chunk in super().generate(request):
                taken.append(chunk.tokens)
                yield chunk

    live = await start(Counting(" ".join(["word"] * 500), delay=0.05))
    await leave_after(live, b"word", stream=True)
    await until(lambda: not live.services.chat.running)
    steps = len(taken)
    await asyncio.sleep(0.2)
    assert len(taken) == steps < 20


async def test_threat_18_what_was_said_before_the_client_left_is_stored_as_aborted(start: Start) -> None:
    live = await start(talkative())
    await leave_after(live, b"word2", stream=True)
    await until(lambda: live.engine.aborted == 1)
    await until(lambda: not live.services.chat.running)
    page = await live.call("GET", "/v1/me/history")
    user, reply = page["data"]
    assert (user["text"], reply["finish"]) == ("talk", "abort")
    assert reply["text"].startswith("word0 word1 word2")
    assert "word499" not in reply["text"]


async def test_threat_18_a_client_that_comes_back_and_asks_again_has_its_question_once(start: Start) -> None:
    live = await start(talkative())
    await leave_after(live, b"word2", stream=True)
    await until(lambda: live.engine.aborted == 1 and not live.services.chat.running)
    await live.say("talk", max_tokens=3)
    roles = [role for role, _ in await live.history()]
    assert roles == ["user", "assistant", "assistant"]


async def fill_disk(live: Live) -> None:
    """Let the database have no page more than it has, and use up those that are free."""
    async with live.services.database.write() as connection:
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
        await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    for number in range(20):
        if not (await live.say(f"{number}" + "x" * 3000))["persona"]["recorded"]:
            return
    raise AssertionError("the disk did not fill")


async def test_threat_23_on_a_full_disk_chat_answers_unrecorded_and_ready_says_why(live: Live) -> None:
    await live.say("before")
    await live.call("GET", "/ready", user=None)
    await fill_disk(live)
    headers = {"Authorization": f"Bearer {await live.key()}"}
    long = {"model": "persona", "messages": [{"role": "user", "content": "x" * 3000}]}
    async with live.http.post("/v1/chat/completions", json=long, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["x-persona-recorded"] == "false"
        body = await answer.json()
    assert body["choices"][0]["message"]["content"] == "Hello."
    assert body["persona"]["recorded"] is False
    assert body["persona"]["turn"] is None
    ready = await live.call("GET", "/ready", user=None)
    assert (ready["ready"], ready["degraded"]) == (True, ["disk"]), "chat goes on"
    assert "disk is full" in ready["checks"]["disk"]
    await live.call("GET", "/health", user=None)
    item = {"ts": 0, "text": "y" * 9000}
    refused = await live.call("POST", "/v1/me/history", json=[item], status=503)
    assert refused["error"]["code"] == "storage_full"


async def test_threat_23_after_space_returns_everything_is_as_before(live: Live) -> None:
    await live.say("before")
    await fill_disk(live)
    async with live.services.database.write() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert (await live.call("GET", "/ready", user=None))["degraded"] == [], "it looked, though nobody chatted"
    assert (await live.say("again"))["persona"]["recorded"] is True


async def test_threat_23_a_full_disk_never_stops_the_beats_for_the_watchdog(live: Live) -> None:
    await live.say("before")
    await fill_disk(live)
    live.services.checks.append(lambda: ("broker", "The broker does not answer."))
    with Manager() as manager:
        async with watching(Supervisor(manager.address, watchdog=0.2)) as watch:
            watch.ready(live.services.pulse, live.url)
            await asyncio.sleep(1.0)
            assert (await live.call("GET", "/ready", user=None))["degraded"] == ["disk", "broker"]
        assert manager.beats(0.1) >= 5


async def test_threat_08_a_stream_ends_on_the_version_on_which_it_began(start: Start) -> None:
    live = await start(ScriptedEngine("one two three four", delay=0.05))
    await live.publish(content=b"first")
    client = await live.openai()
    messages: Any = [{"role": "user", "content": "count"}]
    stream = await client.chat.completions.create(model="persona", messages=messages, stream=True)
    first = await anext(stream)
    await live.publish(content=b"second")
    rest = [chunk async for chunk in stream]
    assert {chunk.system_fingerprint for chunk in [first, *rest]} == {"fp_scripted_1"}
    assert rest[-1].model_extra["persona"]["version"] == 1
    assert (await live.say("again"))["persona"]["version"] == 2


async def test_threat_06_a_corrupt_version_is_answered_for_by_the_one_before(live: Live) -> None:
    from pathlib import Path

    await live.publish(content=b"first")
    await live.publish(content=b"second")
    user = await live.user()
    active = await live.services.adapters.active(user.id)
    assert active is not None
    Path(active.path, "adapter.safetensors").write_bytes(b"flipped")
    answer = await live.say("hi")
    assert answer["persona"]["version"] == 1
    states = [(v["number"], v["state"], v["active"]) for v in (await live.call("GET", "/v1/me/versions"))["data"]]
    assert states == [(1, "published", True), (2, "quarantined", False)]
