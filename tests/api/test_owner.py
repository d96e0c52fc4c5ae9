"""The owner of the machine: users and keys, status, backup, and what monitoring sees."""

import socket
from pathlib import Path
from typing import Any

import pytest
from live import Live, Start

from persona import app
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import ConfigurationError, EngineDown
from persona.settings import Settings


async def admin(live: Live, method: str, path: str, status: int = 200, **options: Any) -> Any:
    async with live.admin.request(method, path, **options) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def test_a_user_is_made_with_a_key_that_works(live: Live) -> None:
    made = await admin(live, "POST", "/admin/users", 201, json={"name": "ann"})
    assert set(made) >= {"user", "key"}
    async with live.http.get("/v1/me", headers={"Authorization": f"Bearer {made['key']}"}) as answer:
        assert (await answer.json())["name"] == "ann"
    rows = (await admin(live, "GET", "/admin/users"))["data"]
    assert [(row["name"], row["learn"], row["active"]) for row in rows] == [("ann", True, None)]


@pytest.mark.parametrize("name", ["", "Ann", "a b", "../x", "-x", "x" * 65, "ä"])
async def test_a_name_that_is_none_is_refused(live: Live, name: str) -> None:
    await admin(live, "POST", "/admin/users", 400, json={"name": name})


async def test_a_name_is_given_once(live: Live) -> None:
    await live.key("ann")
    refused = await admin(live, "POST", "/admin/users", 400, json={"name": "ann"})
    assert refused["error"]["code"] == "user_exists"


async def test_keys_are_added_listed_and_revoked(live: Live) -> None:
    await live.key("ann")
    made = await admin(live, "POST", "/admin/users/ann/keys", 201, json={"label": "tablet", "learn": False})
    rows = (await admin(live, "GET", "/admin/users/ann/keys"))["data"]
    shown = [(row["id"], row["label"], row["learn"]) for row in rows]
    assert shown == [(1, "first", True), (made["id"], "tablet", False)]
    assert not any("key" in row for row in rows)
    await admin(live, "DELETE", f"/admin/users/ann/keys/{made['id']}")
    rows = (await admin(live, "GET", "/admin/users/ann/keys"))["data"]
    assert rows[1]["revoked"] is not None
    await admin(live, "DELETE", "/admin/users/ann/keys/99", 404)
    await admin(live, "GET", "/admin/users/nobody/keys", 404)
    await admin(live, "POST", "/admin/users/ann/keys", 400, json={"label": "x" * 101})


async def test_a_key_that_does_not_learn_records_nothing(live: Live) -> None:
    await live.key("ann")
    made = await admin(live, "POST", "/admin/users/ann/keys", 201, json={"learn": False})
    live.keys["ann"] = made["key"]
    assert (await live.say("hi"))["persona"]["recorded"] is False
    assert await live.history() == []


@pytest.mark.parametrize(
    ("body", "learns"),
    [
        ({}, True),
        ({"device": True}, False),
        ({"device": True, "learn": True}, True),
        ({"device": False, "learn": False}, False),
        ({"device": False, "learn": None}, True),
    ],
    ids=str,
)
async def test_what_several_people_speak_to_learns_only_if_that_is_said(
    live: Live, body: dict[str, Any], learns: bool
) -> None:
    made = await admin(live, "POST", "/admin/users", 201, json={"name": "kitchen", **body})
    assert made["learn"] is learns
    assert [row["learn"] for row in (await admin(live, "GET", "/admin/users"))["data"]] == [learns]
    await live.key("ann")
    made = await admin(live, "POST", "/admin/users/ann/keys", 201, json=body)
    assert made["learn"] is learns
    live.keys["ann"] = made["key"]
    assert (await live.say("hi"))["persona"]["recorded"] is learns


async def test_a_learning_key_of_a_user_who_does_not_learn_does_not_learn(live: Live) -> None:
    await live.key("kitchen", learn=False)
    assert (await admin(live, "POST", "/admin/users/kitchen/keys", 201, json={"learn": True}))["learn"] is False


async def test_status_tells_what_runs(live: Live) -> None:
    await live.key("ann")
    status = await admin(live, "GET", "/admin/status")
    assert (status["users"], status["base"], status["replies_running"]) == (1, "scripted", 0)
    assert status["engine"]["model"] == "scripted"


async def test_a_backup_is_a_folder_of_its_own_outside_the_state_folder(live: Live, tmp_path: Path) -> None:
    await live.say("hi")
    await live.publish()
    folder = tmp_path / "copy"
    made = await admin(live, "POST", "/admin/backup", 201, json={"folder": str(folder)})
    files = [file for file in folder.rglob("*") if file.is_file() and file != folder / "manifest.json"]
    assert made["bytes"] == sum(file.stat().st_size for file in files)
    assert (made["versions"], made["left_out"]) == (1, [])
    inside = str(live.services.settings.home / "copy")
    for place in (str(folder), "relative", str(tmp_path / "missing" / "x"), inside, str(tmp_path / "a\0b")):
        await admin(live, "POST", "/admin/backup", 400, json={"folder": place})


async def test_a_place_that_the_service_sees_differently_is_refused(live: Live, tmp_path: Path) -> None:
    asked = {"folder": str(tmp_path / "copy"), "seen": [1, 1]}
    refused = await admin(live, "POST", "/admin/backup", 400, json=asked)
    assert "another folder" in refused["error"]["message"]
    seen = [tmp_path.stat().st_dev, tmp_path.stat().st_ino]
    await admin(live, "POST", "/admin/backup", 201, json={**asked, "seen": seen})


async def test_ready_names_what_is_not(start: Start) -> None:
    class Lost(ScriptedEngine):
        down = False

        async def health(self) -> Any:
            if self.down:
                raise EngineDown("gone")
            return await super().health()

    engine = Lost()
    live = await start(engine)
    assert (await live.call("GET", "/ready", user=None))["ready"] is True
    engine.down = True
    body = await live.call("GET", "/ready", user=None, status=503)
    assert body["checks"]["database"] == "ok"
    assert "engine" in body["checks"]["engine"]
    assert (await admin(live, "GET", "/admin/status"))["engine"] is None


async def test_metrics_count_and_name_nobody(live: Live) -> None:
    await live.say("canary-in-metrics", user="ann")
    await live.call("GET", "/v1/nothing/canary-in-a-path", status=404)
    async with live.http.get("/metrics") as answer:
        text = await answer.text()
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'persona_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'persona_replies_total{finish="stop"} 1.0' in text
    assert "persona_engine_up 1.0" in text
    assert "canary" not in text
    assert "ann" not in text.replace("channel", "")


async def test_a_second_service_on_one_home_is_refused(live: Live) -> None:
    settings = live.services.settings
    with pytest.raises(ConfigurationError, match="already running"):
        async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()):
            pass
    await admin(live, "GET", "/admin/status")


async def test_a_taken_port_is_one_sentence(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        chosen = settings.model_copy(update={"http": settings.http.model_copy(update={"port": port})})
        with pytest.raises(ConfigurationError, match=f"port {port} is taken"):
            async with app.build(chosen, engine=ScriptedEngine(), tokenizer=ScriptedText()):
                pass


async def test_a_home_too_deep_for_a_socket_is_one_sentence(settings: Settings) -> None:
    deep = settings.model_copy(update={"home": settings.home / ("x" * 100)})
    with pytest.raises(ConfigurationError, match="too long"):
        async with app.build(deep, engine=ScriptedEngine(), tokenizer=ScriptedText()):
            pass


async def test_a_stale_socket_of_a_killed_service_is_no_obstacle(settings: Settings) -> None:
    for _ in range(2):
        async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()):
            pass
        with socket.socket(socket.AF_UNIX) as stale:
            settings.admin_socket.unlink(missing_ok=True)
            stale.bind(str(settings.admin_socket))


async def test_copies_left_by_a_killed_export_are_removed_at_the_start(settings: Settings) -> None:
    left = settings.run_dir / "export-abc"
    left.mkdir(parents=True)
    (left / "history.jsonl").write_text("user text")
    async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()):
        assert not left.exists()
