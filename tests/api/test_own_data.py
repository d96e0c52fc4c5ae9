"""What is the user's own: history in and out, versions, runs, export, forgetting."""

import asyncio
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from live import Live, Start

from persona.engine.protocol import AdapterRef, ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import EngineDown
from storage.imports import MAX_CHARS

DATA = Path(__file__).parent.parent / "data"


def jsonl(*items: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


async def import_(live: Live, content: bytes, *, kind: str = "application/x-ndjson", status: int = 200) -> Any:
    headers = {"Content-Type": kind}
    return await live.call("POST", "/v1/me/history", data=io.BytesIO(content), headers=headers, status=status)


async def test_json_lines_are_imported_once(live: Live) -> None:
    content = jsonl({"ts": "2026-01-01T10:00:00Z", "text": "one"}, {"ts": 1767265200, "text": "two", "id": "b"})
    assert await import_(live, content) == {"stored": 2, "duplicates": 0}
    assert await import_(live, content) == {"stored": 0, "duplicates": 2}
    assert await live.history() == [("user", "one"), ("user", "two")]


async def test_an_array_is_imported_too(live: Live) -> None:
    items = [{"ts": "2026-01-01T10:00:00", "text": "one"}, {"ts": "2026-01-01T11:00:00+02:00", "text": "two"}]
    assert await import_(live, json.dumps(items).encode(), kind="application/json") == {"stored": 2, "duplicates": 0}
    page = await live.call("GET", "/v1/me/history")
    assert [entry["ts"] for entry in page["data"]] == ["2026-01-01T09:00:00+00:00", "2026-01-01T10:00:00+00:00"]
    assert {entry["origin"] for entry in page["data"]} == {"import"}


async def test_json_lines_are_understood_under_any_content_type(live: Live) -> None:
    content = jsonl({"ts": 1, "text": "one"}, {"ts": 2, "text": "two"})
    for kind in ("application/json", "text/plain", "application/octet-stream"):
        await import_(live, content, kind=kind)
    assert len(await live.history()) == 2


async def test_a_real_history_is_imported_with_its_context(live: Live) -> None:
    content = (DATA / "eric.jsonl").read_bytes()
    lines = content.splitlines()
    assert await import_(live, content) == {"stored": len(lines), "duplicates": 0}
    first = (await live.call("GET", "/v1/me/history?limit=1"))["data"][0]
    source = json.loads(lines[0])
    assert first["text"] == source["text"]
    assert first["context"] == source["context"]


async def test_an_upload_longer_than_a_body_may_be_is_read_line_by_line(start: Start) -> None:
    live = await start(http={"max_body": 4096})
    content = jsonl(*({"ts": number, "text": f"message {number} " + "x" * 100} for number in range(1200)))
    assert len(content) > 30 * 4096
    assert await import_(live, content) == {"stored": 1200, "duplicates": 0}
    too_long = jsonl({"ts": 1, "text": "x" * 300_000})
    await import_(live, too_long, status=413)


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"text": "x" * (MAX_CHARS + 1)}, "text"),
        ({"text": "x", "context": [{"author": "bob", "text": "x" * (MAX_CHARS // 50)}] * 50}, "context"),
    ],
    ids=["text", "context"],
)
async def test_an_item_longer_than_any_chat_is_named(start: Start, said: dict[str, Any], param: str) -> None:
    live = await start(http={"max_body": 8 << 20})
    content = jsonl({"ts": 1, "text": "first"}, {"ts": 2, **said})
    refused = await import_(live, content, status=422)
    assert refused["error"]["param"] == param
    assert "Line 2" in refused["error"]["message"]
    assert await live.history() == []


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (b'{"ts": 1}', "text"),
        (b'{"text": "x"}', "ts"),
        (b'{"ts": "yesterday", "text": "x"}', "ts"),
        (b'{"ts": 1e300, "text": "x"}', "ts"),
        (b'{"ts": 1, "text": "x", "role": "system"}', "role"),
        (b'{"ts": 1, "text": 5}', "text"),
        (b'{"ts": 1, "text": " "}', "text"),
        (b"not json", None),
        (b"[]", None),
    ],
)
@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/json"])
async def test_a_line_that_cannot_be_used_is_named(live: Live, line: bytes, param: str | None, kind: str) -> None:
    answer = await import_(live, jsonl({"ts": 1, "text": "fine"}) + line + b"\n", kind=kind, status=422)
    assert answer["error"]["message"].startswith("Line 2: ")
    assert answer["error"]["param"] == param


async def test_of_an_array_the_item_that_cannot_be_used_is_named(live: Live) -> None:
    content = json.dumps([{"ts": 1, "text": "fine"}, {"ts": 1, "text": " "}]).encode()
    answer = await import_(live, content, kind="application/json", status=422)
    assert answer["error"]["message"] == "Item 2: The item has no text."


async def test_a_long_upload_is_stored_as_it_comes_and_is_never_in_memory_as_a_whole(live: Live) -> None:
    long = {"context": [{"author": "bob", "text": "y" * 60_000}]}
    content = jsonl(*({"ts": at, "text": f"{at} " + "x" * 60_000, **long} for at in range(20)))
    await import_(live, content + b"no item\n", status=422)
    assert len(await live.history()) == 18, "two batches of a million characters; the rest came with what was wrong"


async def test_a_user_who_does_not_learn_cannot_import(live: Live) -> None:
    await live.key("ann", learn=False)
    await import_(live, jsonl({"ts": 1, "text": "x"}), status=400)


async def test_history_is_read_in_pages(live: Live) -> None:
    await import_(live, jsonl(*({"ts": number, "text": f"m{number}"} for number in range(5))))
    first = await live.call("GET", "/v1/me/history?limit=3")
    assert [entry["text"] for entry in first["data"]] == ["m0", "m1", "m2"]
    second = await live.call("GET", f"/v1/me/history?limit=3&after={first['next']}")
    assert [entry["text"] for entry in second["data"]] == ["m3", "m4"]
    assert second["next"] is None
    for query in ("limit=0", "limit=1001", "limit=x", "after=-1", "limit=nan"):
        await live.call("GET", f"/v1/me/history?{query}", status=400)


def better(request: ScoreRequest) -> list[float]:
    """Every adapter makes every token a little likelier."""
    return [-0.9 if request.adapter else -1.0] * len(request.targets)


async def test_a_deleted_entry_takes_the_versions_that_absorbed_it(start: Start) -> None:
    live = await start(ScriptedEngine(score=better))
    await import_(live, (DATA / "eric.jsonl").read_bytes())
    run = await live.call("POST", "/v1/me/train?wait=30")
    why = await live.call("POST", "/v1/me/why", json={"run": run["id"]})
    absorbed = why["examples"][0]["entry"]
    gone = await live.call("DELETE", f"/v1/me/history/{absorbed}")
    assert gone["deleted"] is True
    assert (run["state"], gone["versions"]) == ("kept", [run["version"]])
    assert (await live.say("hi"))["persona"]["version"] != run["version"]
    assert len((await live.call("GET", "/v1/me/runs"))["data"]) == 2, "the rest is learned anew by itself"
    assert (await live.user()).id in live.engine.dropped
    assert absorbed not in [entry["id"] for entry in (await live.call("GET", "/v1/me/history?limit=1000"))["data"]]
    await live.call("DELETE", f"/v1/me/history/{absorbed}", status=404)


async def test_an_entry_that_is_deleted_under_a_run_is_unlearned_by_another_run(start: Start) -> None:
    live = await start(ScriptedEngine(score=better))
    lines = (DATA / "eric.jsonl").read_bytes().splitlines(keepends=True)
    await import_(live, b"".join(lines[: len(lines) // 2]))
    first = await live.call("POST", "/v1/me/train?wait=30")
    await import_(live, b"".join(lines[len(lines) // 2 :]))
    live.engine.delay = 0.2
    under_way = await live.call("POST", "/v1/me/train", status=202)
    async with asyncio.timeout(20):
        while len(live.engine.trained) != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    absorbed = (await live.call("POST", "/v1/me/why", json={"run": first["id"]}))["examples"][0]["entry"]
    assert (await live.call("DELETE", f"/v1/me/history/{absorbed}"))["versions"] == [first["version"]]
    stopped = await live.call("GET", f"/v1/me/runs/{under_way['id']}")
    assert stopped["state"] == "interrupted"
    live.engine.delay = 0.0
    runs = (await live.call("GET", "/v1/me/runs"))["data"]
    assert len(runs) == 3
    assert (await live.call("POST", "/v1/me/train?wait=30"))["state"] == "kept"


async def test_training_is_asked_for_and_waited_for(live: Live) -> None:
    await import_(live, (DATA / "eric.jsonl").read_bytes())
    asked = await live.call("POST", "/v1/me/train", status=202)
    assert asked["state"] in ("queued", "running")
    run = await live.call("POST", "/v1/me/train?wait=30")
    assert run["id"] == asked["id"]
    assert run["state"] in ("kept", "rejected")
    assert run["reason"]
    assert (await live.call("GET", "/v1/me/runs"))["data"][0] == run
    assert await live.call("GET", f"/v1/me/runs/{run['id']}") == run


async def test_too_little_history_defers_and_says_so(live: Live) -> None:
    await live.say("hi")
    run = await live.call("POST", "/v1/me/train?wait=30")
    assert run["state"] == "deferred"
    assert run["reason"]


async def test_waiting_ends_before_a_long_run(start: Start) -> None:
    live = await start(ScriptedEngine(delay=0.5))
    await import_(live, (DATA / "eric.jsonl").read_bytes())
    run = await live.call("POST", "/v1/me/train?wait=0.2", status=202)
    assert run["state"] in ("queued", "running")
    await live.call("POST", "/v1/me/train?wait=601", status=400)
    await live.call("POST", "/v1/me/pause")
    run = await live.call("GET", f"/v1/me/runs/{run['id']}")
    assert run["state"] in ("interrupted", "failed", "queued")


async def test_a_paused_user_does_not_train_until_resumed(live: Live) -> None:
    assert await live.call("POST", "/v1/me/pause") == {"paused": True}
    refused = await live.call("POST", "/v1/me/train", status=400)
    assert refused["error"]["code"] == "learning_paused"
    assert (await live.say("hi"))["persona"]["recorded"] is True
    assert await live.call("POST", "/v1/me/resume") == {"paused": False}
    await live.call("POST", "/v1/me/train", status=202)


async def test_where_learning_is_off_nobody_trains(start: Start) -> None:
    live = await start(learning={"enabled": False})
    refused = await live.call("POST", "/v1/me/train", status=400)
    assert refused["error"]["code"] == "learning_disabled"


async def test_rollback_goes_one_back_and_then_to_the_base(live: Live) -> None:
    await live.publish(content=b"first")
    await live.publish(content=b"second")
    assert await live.call("POST", "/v1/me/rollback") == {"version": 1}
    assert (await live.say("hi"))["persona"]["version"] == 1
    assert await live.call("POST", "/v1/me/rollback", json={}) == {"version": None}
    assert (await live.say("hi"))["persona"]["version"] is None
    assert await live.call("POST", "/v1/me/rollback", json={"version": 2}) == {"version": 2}
    assert (await live.say("hi"))["persona"]["version"] == 2
    assert await live.call("POST", "/v1/me/rollback", json={"version": 0}) == {"version": None}
    assert [ref.number for ref in live.engine.flipped] == [1, 2]


async def test_an_engine_that_misses_the_flip_does_not_undo_a_rollback(start: Start) -> None:
    class Deaf(ScriptedEngine):
        async def flip(self, ref: AdapterRef) -> None:
            raise EngineDown("restarting")

    live = await start(Deaf())
    await live.publish(content=b"first")
    await live.publish(content=b"second")
    assert await live.call("POST", "/v1/me/rollback") == {"version": 1}
    assert (await live.say("hi"))["persona"]["version"] == 1


async def test_an_entry_is_deleted_while_the_engine_is_down(start: Start) -> None:
    class Down(ScriptedEngine):
        async def drop(self, user_id: int) -> None:
            raise EngineDown("restarting")

    live = await start(Down(score=better))
    await import_(live, (DATA / "eric.jsonl").read_bytes())
    run = await live.call("POST", "/v1/me/train?wait=30")
    why = await live.call("POST", "/v1/me/why", json={"run": run["id"]})
    gone = await live.call("DELETE", f"/v1/me/history/{why['examples'][0]['entry']}")
    assert gone["versions"] == [run["version"]]


async def test_rollback_to_nothing_is_a_404(live: Live) -> None:
    await live.call("POST", "/v1/me/rollback", status=404)
    await live.publish()
    for version in (2, -1, 1 << 40):
        await live.call("POST", "/v1/me/rollback", json={"version": version}, status=404)


async def test_rollback_to_a_corrupt_version_leaves_the_serving_one(live: Live) -> None:
    await live.publish(content=b"first")
    await live.publish(content=b"second")
    first = await live.services.adapters.get((await live.user()).id, 1)
    assert first is not None
    Path(first.path, "adapter.safetensors").write_bytes(b"bad")
    await live.call("POST", "/v1/me/rollback", status=422)
    assert (await live.say("hi"))["persona"]["version"] == 2
    assert [v["state"] for v in (await live.call("GET", "/v1/me/versions"))["data"]] == ["quarantined", "published"]


async def test_why_shows_prompt_entries_and_version_without_generating(live: Live) -> None:
    await live.say("I live in Ghent")
    await live.publish()
    await live.say("my bike is red")
    why = await live.call("POST", "/v1/me/why", json={"messages": [{"role": "user", "content": "what is red?"}]})
    assert why["version"] == 1
    assert why["watermark"] == 2
    assert why["recorded"] is True
    assert {used["entry"] for used in why["used"]} == {3, 4}
    assert any("my bike is red" in message["content"] for message in why["messages"])
    assert why["messages"][-1]["content"].endswith("what is red?")
    assert len(live.engine.requests) == 2
    assert len(await live.history()) == 4
    await live.call("POST", "/v1/me/why", json={}, status=400)


async def test_threat_33_export_is_one_archive_that_can_be_imported_elsewhere(live: Live) -> None:
    await live.say("hi")
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.get("/v1/me/export", headers=headers) as answer:
        assert answer.status == 200
        assert answer.content_type == "application/zip"
        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
    assert archive.namelist() == ["events.jsonl", "facts.jsonl", "history.jsonl", "manifest.json"]
    manifest = json.loads(archive.read("manifest.json"))
    assert (manifest["user"], manifest["entries"], manifest["version"]) == ("ann", 2, None)
    content = archive.read("history.jsonl")
    await live.key("bob")
    headers = {"Content-Type": "application/x-ndjson"}
    counts = await live.call("POST", "/v1/me/history", user="bob", data=io.BytesIO(content), headers=headers)
    assert counts == {"stored": 2, "duplicates": 0}
    assert await live.history("bob") == await live.history("ann")
    assert list(live.services.settings.run_dir.glob("export-*")) == []


async def test_an_export_that_comes_back_where_it_was_made_stores_nothing_twice(live: Live) -> None:
    for text in ("a first question", "a second question"):
        await live.say(text)
    content = await exported(live)
    sent: dict[str, Any] = {"headers": {"Content-Type": "application/x-ndjson"}}
    before = await live.history()
    first = (await live.call("GET", "/v1/me/history"))["data"][0]["id"]
    assert await live.call("POST", "/v1/me/history", data=io.BytesIO(content), **sent) == {"stored": 0, "duplicates": 4}
    await live.call("DELETE", f"/v1/me/history/{first}")
    assert await live.call("POST", "/v1/me/history", data=io.BytesIO(content), **sent) == {"stored": 0, "duplicates": 4}
    assert await live.history() == before[1:]
    changed = content.replace(b"a second question", b"another question")
    assert await live.call("POST", "/v1/me/history", data=io.BytesIO(changed), **sent) == {"stored": 1, "duplicates": 3}


async def exported(live: Live) -> bytes:
    """history.jsonl of ann's export."""
    async with live.http.get("/v1/me/export", headers={"Authorization": f"Bearer {await live.key()}"}) as answer:
        return zipfile.ZipFile(io.BytesIO(await answer.read())).read("history.jsonl")


async def test_forget_needs_the_name_and_then_removes_everything(live: Live) -> None:
    await live.say("a secret of ann's")
    await live.publish()
    refused = await live.call("POST", "/v1/me/forget", json={"confirm": "anna"}, status=400)
    assert refused["error"]["param"] == "confirm"
    user = await live.user()
    receipt = await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
    assert (receipt["users"], receipt["entries"], receipt["keys"], receipt["versions"]) == (1, 2, 1, 1)
    await live.call("GET", "/v1/me", status=401)
    assert user.id in live.engine.dropped
    assert not (live.services.settings.adapters / str(user.id)).exists()


async def test_threat_32_no_byte_of_a_forgotten_user_stays_in_the_state_folder(live: Live) -> None:
    await live.say("canary-7f3a9 in a message")
    await live.say("something of bob's", user="bob")
    await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
    for file in live.services.settings.home.rglob("*"):
        if file.is_file():
            assert b"canary-7f3a9" not in file.read_bytes(), file
    assert len(await live.history("bob")) == 2


async def test_threat_32_a_reply_under_way_does_not_bring_the_user_back(start: Start) -> None:
    live = await start(ScriptedEngine(" ".join(["word"] * 300), delay=0.01))
    client = await live.openai()
    messages: Any = [{"role": "user", "content": "talk"}]
    stream = await client.chat.completions.create(model="persona", messages=messages, stream=True)
    await anext(stream)
    await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
    rest = [chunk async for chunk in stream]
    assert rest[-1].choices[0].finish_reason == "length"
    assert await live.services.users.get("ann") is None
    assert not live.services.chat.running


async def test_me_says_how_things_stand(live: Live) -> None:
    await live.say("hi there")
    me = await live.call("GET", "/v1/me")
    assert (me["name"], me["learn"], me["paused"], me["version"]) == ("ann", True, False, None)
    assert (me["last_entry"], me["new_tokens"]) == (2, len("hi there"))
    await live.publish()
    me = await live.call("GET", "/v1/me")
    assert (me["version"], me["watermark"], me["new_tokens"]) == (1, 2, 0)
