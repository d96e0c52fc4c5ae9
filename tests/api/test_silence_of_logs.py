"""No word of a user reaches a log line, a metric or an error, whatever goes wrong."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from live import Live, Start

from persona import logs
from persona.engine.scripted import ScriptedEngine
from persona.errors import EngineDown
from persona.settings import Log

CANARY = "canary-5e1f"
# Schemas that cannot be followed, with the canary wherever a library might quote it.
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": CANARY},
    {"type": "string", "format": CANARY},
    {"type": "string", "pattern": f"({CANARY}"},
    {"type": "string", "pattern": f"(?={CANARY})"},
    {"$ref": f"#/$defs/{CANARY}"},
    {"$ref": f"http://{CANARY}/"},
    {"type": "object", "properties": {CANARY: {"not": {"const": CANARY}}}},
    {"type": "object", "properties": CANARY},
    {"type": "object", "required": [CANARY], "additionalProperties": False},
    {"enum": [CANARY], "type": "integer"},
    {"patternProperties": {f"^{CANARY}.*b$": {}, f"^{CANARY}1.*b$": {}}},
)


@pytest.fixture(params=[True, False], ids=["json", "console"])
def logged(request: pytest.FixtureRequest) -> Iterator[None]:
    """Logging as the service sets it up, at its most talkative."""
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    logs.configure(Log(level="debug", json_lines=request.param))
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


async def everything_that_can_go_wrong(live: Live, engine: ScriptedEngine) -> None:
    """Requests of every kind, each with the canary in it."""
    user = {"role": "user", "content": f"{CANARY} hello"}
    await live.say(CANARY)
    await live.say(CANARY, model="base")
    await live.say(CANARY, model=CANARY, status=404)
    await live.say(CANARY, tools=[{CANARY: 1}], status=400)
    await live.say(CANARY, metadata={"conversation_id": f"{CANARY} !"}, status=400)
    await live.say(CANARY, stop=[CANARY * 100], status=400)
    await live.say(CANARY, logit_bias={CANARY: 1}, status=400)
    await live.say(CANARY, response_format={"type": CANARY}, status=400)
    for schema in _SCHEMAS:
        form = {"type": "json_schema", "json_schema": {"name": CANARY, "schema": schema}}
        await live.say(CANARY, response_format=form, status=400)
    for change in ({"prompt": [CANARY, 5]}, {"prompt": "x", "suffix": CANARY}, {"prompt": "x", "echo": CANARY}):
        body = {"model": "base", **change}
        await live.call("POST", "/v1/completions", json=body, status=400)
    await live.say(CANARY, temperature=CANARY, status=400)
    await live.say("", messages=[{"role": CANARY, "content": CANARY}], status=400)
    await live.say("", messages=[user, {"role": "user", "content": [{"type": CANARY}]}], status=400)
    await live.say(CANARY * 2000, status=400)
    for body in (CANARY.encode(), f'{{"{CANARY}": '.encode(), f'"{CANARY}"'.encode()):
        await live.call("POST", "/v1/chat/completions", data=body, status=400)
    await live.call("POST", "/v1/feedback", json={"turn": 2, "correction": CANARY})
    await live.call("POST", "/v1/me/why", json={"messages": [user]})
    for line in (f'{{"ts": "{CANARY}", "text": "x"}}', CANARY, f'{{"ts": 1, "text": "x", "role": "{CANARY}"}}'):
        headers = {"Content-Type": "application/x-ndjson"}
        await live.call("POST", "/v1/me/history", data=io.BytesIO(line.encode()), headers=headers, status=422)
    await live.call("GET", f"/v1/{CANARY}?{CANARY}={CANARY}", status=404)
    await live.call("GET", f"/v1/me/runs/{CANARY}", status=404)
    await live.call("GET", "/v1/me", user=None, headers={"Authorization": f"Bearer {CANARY}"}, status=401)
    await everything_that_ollamas_clients_do_wrong(live)
    await live.call("POST", "/v1/me/forget", json={"confirm": CANARY}, status=400)
    for failure in (ValueError(CANARY), EngineDown("down"), KeyError(CANARY)):
        engine.failure = failure
        status = 503 if isinstance(failure, EngineDown) else 500
        await live.say(CANARY, status=status)
        await live.say(CANARY, stream=True, status=status)
        await live.call("POST", "/api/chat", json={"model": "persona", "messages": [user]}, status=status)
    engine.failure = None
    await live.call("POST", "/v1/me/train?wait=20")


async def everything_that_ollamas_clients_do_wrong(live: Live) -> None:
    """Each request with the canary in it, in place of the key too."""
    user = {"role": "user", "content": f"{CANARY} hello"}
    tool = {"function": {"name": CANARY, "description": CANARY, "parameters": {CANARY: CANARY}}}
    call = {"role": "assistant", "content": CANARY, "tool_calls": [{"function": {"name": CANARY}}]}
    good: dict[str, Any] = {"model": "persona", "messages": [user, call, {"role": "tool", "content": CANARY}]}
    await live.call("POST", "/api/chat", json={**good, "stream": False, "tools": [tool]})
    for change in (
        {"format": CANARY},
        {"format": {"type": CANARY}},
        {"options": {"temperature": CANARY}},
        {"options": {"stop": [CANARY * 100]}},
        {"messages": [{"role": CANARY}]},
        {"messages": [{"role": "user", "images": [CANARY]}]},
        {"tools": [{**tool, "type": CANARY}]},
        {"tools": [CANARY]},
    ):
        await live.call("POST", "/api/chat", json={**good, **change}, status=400)
    await live.call("POST", "/api/chat", json={**good, "model": CANARY}, status=404)
    await live.call("POST", "/api/show", json={"model": CANARY}, status=404)
    await live.call("POST", "/api/pull", json={"model": CANARY}, status=400)
    await live.call("GET", f"/api/{CANARY}?{CANARY}", status=404)
    for path in (f"/key/{CANARY}", f"/key/{CANARY}/api/tags", f"/key/{CANARY}/{CANARY}?{CANARY}"):
        await live.call("GET", path, status=401)


@pytest.mark.usefixtures("logged")
async def test_threat_28_no_log_line_holds_a_key(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    key = await live.key()
    body = {"model": "persona", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    await live.call("POST", f"/key/{key}/api/chat", user=None, json=body)
    await live.call("GET", f"/key/{key}/api/nothing", user=None, status=404)
    await live.call("PUT", f"/key/{key}/api/chat", user=None, status=405)
    live.engine.failure = ValueError(key)
    await live.call("POST", f"/key/{key}/api/chat", user=None, json=body, status=500)
    await raw(live, f"GET /key/{key}/api/tags HTTP/9.9\r\n\r\n")
    await raw(live, f"GET /key/{key}/api/tags HTTP/1.1\r\nHost: x\r\nbroken\r\n\r\n")
    async with live.http.get("/metrics") as answer:
        page = await answer.text()
    captured = capsys.readouterr()
    assert "/key/{key}/api/chat" in captured.out
    assert "/key/{key}/api/chat" in page
    for text in (captured.out, captured.err, page):
        assert key not in text
        assert key[:12] not in text


@pytest.mark.usefixtures("logged")
async def test_threat_28_no_log_line_holds_a_users_word(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(f"{CANARY} reply")
    live = await start(engine)
    await everything_that_can_go_wrong(live, engine)
    await raw(live, f"GET /{CANARY} HTTP/9.9\r\n{CANARY}\r\n\r\n")
    await raw(live, f"POST /v1/me HTTP/1.1\r\nHost: x\r\n{CANARY}: \x01\r\n\r\n")
    async with live.http.get("/metrics") as answer:
        assert CANARY not in await answer.text()
    captured = capsys.readouterr()
    assert "/v1/chat/completions" in captured.out
    assert "request failed" in captured.out
    for text in (captured.out, captured.err):
        assert CANARY not in text


async def raw(live: Live, request: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    writer.write(request.encode())
    answer = await reader.read()
    writer.close()
    return answer


async def test_threat_28_no_error_body_holds_a_users_word(start: Start) -> None:
    engine = ScriptedEngine()
    bodies: list[Any] = []

    live = await start(engine)
    call = live.call

    async def noting(*arguments: Any, **options: Any) -> Any:
        body = await call(*arguments, **options)
        if options.get("status", 200) >= 400:
            bodies.append(body)
        return body

    live.call = noting  # type: ignore[method-assign]
    await everything_that_can_go_wrong(live, engine)
    assert len(bodies) > 20
    for body in bodies:
        assert CANARY not in json.dumps(body)


@pytest.mark.usefixtures("logged")
async def test_threat_28_lines_of_libraries_lose_their_message(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        logging.getLogger("a.library").exception("failed with %s: " + CANARY, CANARY)
        structlog.get_logger().error("ours", exc_info=True)
        structlog.get_logger().exception("ours again")
        logs.loop_error(asyncio.get_running_loop(), {"message": CANARY, "exception": error})
    out = capsys.readouterr().out
    assert CANARY not in out
    assert out.count("ValueError") == 4
    assert "test_silence_of_logs.py" in out
