"""Events over HTTP: told, listed, refused, tried again, exported, and each user's own."""

import io
import json
import zipfile
from typing import Any

import aiohttp
import pytest
from live import Live, Start

from persona.engine.scripted import ScriptedEngine


async def tell(live: Live, kind: str, body: Any, user: str = "ann", status: int = 201) -> Any:
    return await live.call("POST", f"/v1/me/events/{kind}", user=user, status=status, json=body)


async def test_a_message_becomes_history_and_the_same_one_again_does_not(live: Live) -> None:
    assert await tell(live, "message", {"id": 1, "text": "bought a tent"}) == {"outcome": "stored"}
    assert await tell(live, "message", {"id": 1, "text": "bought a tent"}, status=200) == {"outcome": "duplicate"}
    assert await live.history() == [("user", "bought a tent")]
    listed = await live.call("GET", "/v1/me/events")
    assert [(one["kind"], one["entry"]) for one in listed["data"]] == [("message", 1)]
    assert listed["sources"][0]["duplicates"] == 1


async def test_a_fact_stands_in_the_next_prompt_and_can_be_taken_away(live: Live) -> None:
    await tell(live, "fact", {"key": "diet/lunch", "value": "vegan"})
    why = await live.call("POST", "/v1/me/why", json={"messages": [{"role": "user", "content": "hi"}]})
    assert '"diet/lunch": "vegan"' in why["messages"][0]["content"]
    assert {"entry": None, "key": "diet/lunch", "part": "fact"}.items() <= why["used"][0].items()
    assert (await live.call("GET", "/v1/me/facts"))["data"][0]["value"] == "vegan"
    await live.call("DELETE", "/v1/me/facts/fact/diet/lunch")
    await live.call("DELETE", "/v1/me/facts/fact/diet/lunch", status=404)
    assert (await live.call("GET", "/v1/me/facts"))["data"] == []


async def test_feedback_as_an_event_weights_the_reply(live: Live) -> None:
    turn = (await live.say("hi"))["persona"]["turn"]
    await tell(live, "feedback", {"turn": turn, "rating": 1})
    page = await live.call("GET", "/v1/me/history")
    assert [entry["rating"] for entry in page["data"]] == [None, 1]
    body = await tell(live, "feedback", {"turn": 999, "rating": 1}, status=404)
    assert body["error"]["code"] == "unknown_turn"
    await live.key("bob")
    await tell(live, "feedback", {"turn": turn, "rating": -1}, user="bob", status=404)


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("message", b"{", "bad_json"),
        ("message", b"", "bad_json"),
        ("message", b"\xff\xfe{}", "bad_encoding"),
        ("message", b"{}", "bad_payload"),
        ("message", b'{"text": "x", "user": "bob"}', "forged_user"),
        ("message", b'{"text": "x", "ts": "yesterday"}', "bad_payload"),
        ("state", b'{"key": "door"}', "bad_payload"),
        ("Door!", b"1", "bad_topic"),
    ],
)
async def test_what_cannot_be_an_event_is_refused_with_its_reason(
    live: Live, kind: str, content: bytes, code: str
) -> None:
    body = await live.call("POST", f"/v1/me/events/{kind}", data=content, status=400)
    assert body["error"]["code"] == code
    assert body["error"]["message"].endswith(".")
    assert await live.history() == []


async def test_an_event_above_the_limit_is_413(start: Start) -> None:
    live = await start(mqtt={"max_payload": 300})
    await tell(live, "note", {"text": "x" * 300}, status=413)


async def test_a_user_who_sends_too_many_is_told_when_to_come_back(start: Start) -> None:
    live = await start(mqtt={"events_per_second": 0.001, "burst": 2})
    await tell(live, "note", 1)
    await tell(live, "note", 2)
    body = await tell(live, "note", 3, status=429)
    assert body["error"]["code"] == "rate_limited"
    await live.key("bob")
    await tell(live, "note", 1, user="bob")


async def test_a_user_who_does_not_learn_leaves_facts_and_no_history(live: Live) -> None:
    await live.key("kitchen", learn=False)
    body = await tell(live, "message", {"text": "who said this?"}, user="kitchen", status=400)
    assert body["error"]["code"] == "not_recorded"
    await tell(live, "state", {"key": "oven", "value": "on"}, user="kitchen")
    assert await live.history("kitchen") == []


async def letters(live: Live, **refused: bytes) -> list[int]:
    """Dead letters of ann or of nobody, by the kind and payload that was refused; their numbers."""
    from persona.events import Delivery

    await live.user("ann")
    for kind, payload in refused.items():
        name = "later" if kind == "message" else "ann"
        await live.services.intake.accept([Delivery(name, kind, payload, size=len(payload))])
    return [letter.id for letter in await live.services.events.letters(None)]


async def test_threat_02_a_dead_letter_is_its_users_and_the_owners_alone(live: Live) -> None:
    nobodys, anns = await letters(live, message=b'{"text": "hello"}', state=b"{}")
    await live.key("bob")
    mine = (await live.call("GET", "/v1/me/events/dead"))["data"]
    assert [(one["id"], one["reason"], one["payload"]) for one in mine] == [(anns, "bad_payload", "{}")]
    assert (await live.call("GET", "/v1/me/events/dead", user="bob"))["data"] == []
    for letter in (nobodys, anns, 999):
        body = await live.call("DELETE", f"/v1/me/events/dead/{letter}", user="bob", status=404)
        assert body["error"]["message"] == "There is no such dead letter among yours."
        await live.call("POST", "/v1/me/events/dead/replay", user="bob", json={"ids": [letter]}, status=404)
    async with live.admin.get("/admin/events/dead") as answer:
        assert [one["user"] for one in (await answer.json())["data"]] == ["later", "ann"]


async def test_a_letter_that_waited_for_its_user_is_stored_when_it_is_tried_again(live: Live) -> None:
    (letter,) = await letters(live, message=b'{"id": 5, "text": "I was early"}')
    assert await replayed(live.admin) == {"dead": 1, "without_payload": 0}
    await live.key("later")
    assert await replayed(live.admin) == {"stored": 1, "without_payload": 0}
    assert await live.history("later") == [("user", "I was early")]
    async with live.admin.get("/admin/events/dead") as answer:
        assert (await answer.json())["data"] == []
    async with live.admin.delete(f"/admin/events/dead/{letter}") as answer:
        assert answer.status == 404


async def replayed(admin: aiohttp.ClientSession) -> Any:
    async with admin.post("/admin/events/dead/replay") as answer:
        return await answer.json()


async def test_threat_33_an_export_holds_events_and_facts_and_can_be_imported(live: Live) -> None:
    await tell(live, "message", {"id": 1, "text": "my words"})
    await tell(live, "doorbell", {"pressed": True})
    await tell(live, "fact", {"key": "diet", "value": "vegan"})
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.get("/v1/me/export", headers=headers) as answer:
        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
    history = archive.read("history.jsonl")
    assert [json.loads(line)["text"] for line in history.splitlines()] == ["my words"]
    assert [json.loads(line)["text"] for line in archive.read("events.jsonl").splitlines()] == ['{"pressed":true}']
    assert [json.loads(line)["value"] for line in archive.read("facts.jsonl").splitlines()] == ["vegan"]
    ndjson = {"content-type": "application/x-ndjson"}
    counts = await live.call("POST", "/v1/me/history", user="bob", data=history, headers=ndjson)
    assert counts["stored"] == 1


async def test_receipts_and_dead_letters_go_after_their_days_and_what_they_became_stays(start: Start) -> None:
    live = await start(mqtt={"keep_days": 1e-9})
    await tell(live, "message", {"id": 1, "text": "I stay"})
    await tell(live, "fact", {"key": "diet", "value": "vegan"})
    await letters(live, state=b"{}")
    await live.services.schedule._tidy()  # type: ignore[attr-defined]
    assert (await live.call("GET", "/v1/me/events"))["data"] == []
    assert (await live.call("GET", "/v1/me/events/dead"))["data"] == []
    assert await live.history() == [("user", "I stay")]
    assert len((await live.call("GET", "/v1/me/facts"))["data"]) == 1
    assert await tell(live, "message", {"id": 1, "text": "I stay"}, status=200) == {"outcome": "duplicate"}


async def test_metrics_count_events_by_outcome_and_reason(live: Live) -> None:
    await tell(live, "note", {"id": 1})
    await tell(live, "note", {"id": 1}, status=200)
    await letters(live, state=b"{}")
    async with live.http.get("/metrics") as answer:
        text = await answer.text()
    assert 'persona_events_total{outcome="stored"} 1.0' in text
    assert 'persona_events_total{outcome="duplicate"} 1.0' in text
    assert 'persona_dead_letters_total{reason="bad_payload"} 1.0' in text


async def test_threat_12_a_fact_of_one_user_reaches_no_prompt_of_another(start: Start) -> None:
    engine = ScriptedEngine()
    live = await start(engine)
    await tell(live, "fact", {"key": "safe", "value": "canary-4711"})
    await tell(live, "state", {"key": "alarm", "value": "canary-4712"})
    for model in ("persona", "me", "base"):
        await live.say("what is in the safe, and the alarm?", user="bob", model=model)
    seen = [live.services.tokenizer.decode(request.tokens) for request in engine.requests]
    assert len(seen) == 3
    assert not [text for text in seen if "canary" in text]
    await live.say("what is in the safe, and the alarm?")
    assert "canary-4711" in live.services.tokenizer.decode(engine.requests[-1].tokens)
