"""What a hostile or broken client sends is refused early, in bounded time and memory."""

import asyncio
import contextlib
import io
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st
from live import Live, Start

from persona import chat_openai
from persona.api import connections
from persona.chat_sampling import Limits
from persona.domain import Role
from persona.engine.scripted import ScriptedEngine
from persona.errors import RequestError
from persona.wire import decode

HI: dict[str, Any] = {"model": "persona", "messages": [{"role": "user", "content": "hi"}]}
LIMITS = Limits(reply=100, vocab=1000)


async def raw(live: Live, request: bytes, *, seconds: float = 5.0, source: str = "127.0.0.1") -> bytes:
    """What the service sends back to these bytes, which come from `source`, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port, local_addr=(source, 0))
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(seconds):
            return await reader.read()
    finally:
        writer.close()


def head(key: str, *lines: str) -> bytes:
    parts = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *lines]
    return "\r\n".join([*parts, "", ""]).encode()


async def test_threat_16_a_body_of_100_megabytes_is_refused_before_it_is_read(live: Live) -> None:
    key = await live.key()
    answer = await raw(live, head(key, "Content-Length: 104857600", "Connection: close"))
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "too_large"
    assert live.engine.requests == []


async def test_threat_16_a_body_that_hides_its_length_is_cut_at_the_limit(start: Start) -> None:
    live = await start(http={"max_body": 1 << 16})
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 16
            yield b"x" * (1 << 16)

    headers = {"Authorization": f"Bearer {await live.key()}"}
    try:
        async with live.http.post("/v1/chat/completions", data=endless(), headers=headers) as answer:
            assert answer.status == 413
    except aiohttp.ClientConnectionError:  # refused while still sending
        pass
    assert sent < 64 << 20


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 200_000],
    ids=["lists", "objects", "inside a field"],
)
async def test_threat_16_deep_nesting_is_refused(live: Live, body: bytes) -> None:
    answer = await live.call("POST", "/v1/chat/completions", data=io.BytesIO(body), status=400)
    assert answer["error"]["code"] in ("invalid_json", "invalid_type")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_completion_tokens": 10**20}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1 << 70}, "seed"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 10_000}, "stop"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e9}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1 << 63}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"response_format": "json"}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"metadata": {"conversation_id": 5}}, "metadata.conversation_id"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_threat_16_values_out_of_bounds_are_refused_before_work_is_queued(
    live: Live, change: dict[str, Any], param: str
) -> None:
    answer = await live.say("hi", status=400, **change)
    assert (answer["error"]["code"], answer["error"]["param"]) == ("unsupported_value", param)
    assert live.engine.requests == []
    assert await live.history() == []


async def test_threat_16_a_million_messages_are_too_many(start: Start) -> None:
    live = await start(http={"max_body": 64 << 20})
    messages = [{"role": "user", "content": ""}] * 1_000_000
    body = msgspec.json.encode({"model": "persona", "messages": messages})
    await live.call("POST", "/v1/chat/completions", data=io.BytesIO(body), status=413)
    assert live.engine.requests == []


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False, "top_logprobs": 0},
        {"presence_penalty": 0.0, "frequency_penalty": 0},
        {"logit_bias": {}},
        {"repetition_penalty": 1, "top_k": -1, "min_p": 0},
        {"logit_bias": None, "top_k": None, "min_p": None, "n": None},
        {"stop": None, "seed": None, "max_tokens": None, "stream": None, "store": None, "metadata": None},
        {"user": "me", "service_tier": "auto", "reasoning_effort": "low", "an_unknown_field": {"a": [1]}},
        {"metadata": {"anything": "else"}},
    ],
    ids=lambda value: ",".join(value),
)
async def test_what_changes_nothing_is_taken(live: Live, change: dict[str, Any]) -> None:
    await live.say("hi", **change)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "  \n"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}],
        ["x"],
        "x",
    ],
    ids=str,
)
async def test_messages_that_ask_nothing_are_refused(live: Live, messages: Any) -> None:
    answer = await live.call(
        "POST", "/v1/chat/completions", json={"model": "persona", "messages": messages}, status=400
    )
    assert answer["error"]["message"]
    assert live.engine.requests == []


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b'{"model": "persona"}', b"{}{}"])
async def test_what_is_no_request_is_a_400_in_json(live: Live, body: bytes) -> None:
    answer = await live.call("POST", "/v1/chat/completions", data=body, status=400)
    assert answer["error"]["type"] == "invalid_request_error"


async def test_text_parts_are_joined_and_developers_are_system(live: Live) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": parts},
    ]
    await live.say("", messages=messages)
    prompt = bytes(token for token in live.engine.requests[-1].tokens if token < 256).decode()
    assert "be brief" in prompt
    assert prompt.endswith("one\ntwo")


async def test_threat_30_an_image_url_is_refused_and_nothing_connects(live: Live) -> None:
    connected = []

    async def noted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)
        writer.close()

    server = await asyncio.start_server(noted, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/latest/meta-data", "http://169.254.169.254/latest/meta-data/", "file:///x"):
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = await live.say("", messages=[{"role": "user", "content": [part]}], status=400)
        assert answer["error"]["code"] == "unsupported_value"
        assert answer["error"]["param"] == "messages[0].content"
    await asyncio.sleep(0.05)
    server.close()
    assert connected == []


async def test_a_packed_body_is_refused(live: Live) -> None:
    await live.call("POST", "/v1/chat/completions", data=b"x", headers={"Content-Encoding": "gzip"}, status=400)


async def test_threat_17_a_half_sent_body_is_answered_408_and_cut(start: Start) -> None:
    live = await start(http={"body_seconds": 0.3})
    answer = await raw(live, head(await live.key(), "Content-Length: 100") + b'{"model": "per')
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert b"request_timeout" in answer


async def test_threat_17_a_half_sent_header_is_cut(start: Start) -> None:
    live = await start(http={"keepalive_seconds": 0.4})
    assert await raw(live, b"GET /v1/me HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""


async def test_threat_17_an_idle_connection_is_cut(start: Start) -> None:
    live = await start(http={"keepalive_seconds": 0.4})
    answer = await raw(live, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b'"status": "ok"' in answer


async def test_threat_17_one_connection_too_many_gets_a_503(start: Start) -> None:
    live = await start(http={"connections": 3})
    held = [await asyncio.open_connection("127.0.0.1", live.port) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert b" 503 " in await raw(live, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.05)
    async with live.http.get("/health") as answer:
        assert answer.status == 200


async def test_threat_17_one_address_leaves_places_to_others(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "household", lambda peer: None if peer[0] == "127.0.0.1" else peer[0])
    live = await start(http={"connections": 8})
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    held = [await asyncio.open_connection("127.0.0.1", live.port, local_addr=("127.0.0.2", 0)) for _ in range(2)]
    answer = await raw(live, request, source="127.0.0.2")
    assert b" 503 " in answer
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"] == "Too many connections from this address."
    assert b" 200 " in await raw(live, request, source="127.0.0.3")
    held += [await asyncio.open_connection("127.0.0.1", live.port) for _ in range(5)]  # a proxy's
    assert b" 200 " in await raw(live, request)
    held[0][1].close()
    await asyncio.sleep(0.05)
    assert b" 200 " in await raw(live, request, source="127.0.0.2")
    for _, writer in held:
        writer.close()


@pytest.mark.parametrize(
    ("peer", "home"),
    [
        (("192.168.1.5", 4711), "192.168.1.5"),
        (("::ffff:192.168.1.5", 4711, 0, 0), "192.168.1.5"),
        (("127.0.0.1", 4711), None),
        (("::1", 4711, 0, 0), None),
        (("::ffff:127.0.0.1", 4711, 0, 0), None),
        ("", None),
        (None, None),
    ],
    ids=str,
)
def test_an_address_is_the_same_however_it_is_written(peer: Any, home: str | None) -> None:
    assert connections.household(peer) == home


def test_an_ipv6_network_is_one_address() -> None:
    one, other, far = (("2001:db8::1", 1, 0, 0), ("2001:db8::2%eth0", 1, 0, 2), ("2001:db8:0:1::1", 1, 0, 0))
    assert connections.household(one) == connections.household(other) != connections.household(far)


async def test_threat_17_readers_that_stop_reading_are_cut_and_their_replies_aborted(start: Start) -> None:
    words = " ".join(["w" * 20_000] * 1000)
    live = await start(
        ScriptedEngine(words, delay=0.001),
        http={"write_seconds": 0.3},
        engine={"context": 8192},
        prompt={"max_reply_tokens": 1000},
    )
    body = json.dumps({**HI, "stream": True}).encode()
    request = head(await live.key(), f"Content-Length: {len(body)}") + body
    readers = []
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port, limit=1024)
        writer.write(request)
        readers.append((reader, writer))
    for _ in range(400):
        if live.engine.aborted == 5 and not live.services.chat.running:
            break
        await asyncio.sleep(0.05)
    for _, writer in readers:
        writer.close()
    assert live.engine.aborted == 5
    assert not live.services.chat.running


# Model names.

MODELS = st.one_of(
    st.text(max_size=80),
    st.from_regex(r"(persona|me|base)?[@/.\\ ]{0,3}[0-9.\-]{0,20}", fullmatch=True),
    st.sampled_from(["../../etc/passwd", "persona@../b", "persona@1\0", "p" * 10_000, "реrsona", "persona@٣"]),
).filter(lambda name: name not in ("persona", "me", "base"))


class Opened:
    """The files that this process opens while `watching`. An audit hook cannot be taken out again."""

    def __init__(self) -> None:
        self.watching = False
        self.paths: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open":
            self.paths.append(str(arguments[0]))


OPENED = Opened()
ROOT = Path(__file__).parents[2]


def strange(paths: Sequence[str], home: Path) -> list[str]:
    """Those that climb, or end elsewhere than in the state folder, in Python or in this repository."""
    known = [os.path.realpath(folder) for folder in (home, sys.prefix, sys.base_prefix, ROOT)]
    real = {path: Path(os.path.realpath(path)) for path in paths}
    return [path for path in paths if ".." in path.split("/") or not any(map(real[path].is_relative_to, known))]


def test_a_path_that_begins_like_the_state_folder_and_leaves_it_is_strange(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to("/etc")
    good = [f"{home}/adapters/1/1/manifest.json", f"{ROOT}/persona/chat.py", json.__file__]
    bad = [f"{home}/adapters/../../etc/passwd", f"{home}/adapters/1/../b", f"{home}/link/passwd", f"{home}-2/x"]
    assert strange([*good, *bad, "/etc/passwd"], home) == [*bad, "/etc/passwd"]


async def test_threat_04_no_model_name_reaches_the_file_system(live: Live) -> None:
    await live.publish()
    key = await live.key()
    loop = asyncio.get_running_loop()

    async def status(name: str) -> int:
        body = msgspec.json.encode({**HI, "model": name})
        async with live.http.post(
            "/v1/chat/completions", data=body, headers={"Authorization": f"Bearer {key}"}
        ) as answer:
            assert (await answer.json())["error"]["code"] == "model_not_found"
            return answer.status

    @given(MODELS)
    @rules(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def refused(name: str) -> None:
        if name.removeprefix("persona@") == "1":
            return
        name = name.encode("utf-8", "replace").decode()
        assert asyncio.run_coroutine_threadsafe(status(name), loop).result(10) == 404

    OPENED.watching = True
    try:
        await asyncio.to_thread(refused)
    finally:
        OPENED.watching = False
    assert strange(OPENED.paths, live.services.settings.home) == []


@pytest.mark.parametrize("name", ["../../etc", "persona@../b", "persona@1\0", "persona/1", "x" * 10_000, "реrsona@1"])
async def test_threat_04_strange_models_have_the_text_of_unknown_ones(live: Live, name: str) -> None:
    await live.publish()
    usual = await live.say("hi", model="persona@77", status=404)
    assert await live.say("hi", model=name, status=404) == usual


VALUES = st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(st.dictionaries(st.text(max_size=12), VALUES))
def test_threat_16_any_extra_fields_are_ignored(extra: dict[str, Any]) -> None:
    extra = {f"x-{name}": value for name, value in extra.items()}
    body = msgspec.json.encode({**extra, **HI})
    ask = chat_openai.understand(msgspec.json.decode(body, type=chat_openai.Completion), LIMITS)
    plain = msgspec.json.decode(msgspec.json.encode(HI), type=chat_openai.Completion)
    assert ask == chat_openai.understand(plain, LIMITS)


@given(st.sampled_from(sorted(chat_openai.Completion.__struct_fields__)), VALUES)
def test_threat_16_any_value_of_a_known_field_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    body = msgspec.json.encode({**HI, name: value})
    with contextlib.suppress(RequestError):
        ask = chat_openai.understand(decode(body, chat_openai.Completion), LIMITS)
        assert ask.messages[-1].role is Role.USER


SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script>"


async def test_threat_31_no_answer_is_a_page_whatever_stands_in_it(start: Start) -> None:
    """There is no page of ours, and nothing that a browser opens may become one: not a chat, an event, or an error."""
    live = await start(ScriptedEngine(SCRIPT))
    key, hi = await live.key(), [{"role": "user", "content": SCRIPT}]
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/html"}
    asked: list[tuple[str, str, Any]] = [
        ("POST", "/v1/chat/completions", {"model": "persona", "messages": hi}),
        ("POST", "/v1/chat/completions", {"model": "persona", "messages": hi, "stream": True}),
        ("POST", "/api/chat", {"model": "persona", "messages": hi}),
        ("POST", "/v1/me/events/message", {"text": SCRIPT, "source": "<b>bell</b>"}),
        ("POST", f"/v1/me/events/{quote(SCRIPT, safe='')}", {"text": SCRIPT}),
        ("GET", "/v1/me/history", None),
        ("GET", "/v1/me/events", None),
        ("GET", f"/key/{key}/{quote(SCRIPT)}", None),
        ("GET", f"/{quote(SCRIPT)}", None),
        ("GET", "/", None),
        ("GET", "/ready", None),
    ]
    said = ""
    for method, path, body in asked:
        async with live.http.request(method, path, json=body, headers=headers) as answer:
            said += await answer.text()
            assert answer.content_type in (
                "application/json",
                "text/event-stream",
                "application/x-ndjson",
                "text/plain",
            )
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "set-cookie" not in answer.headers  # so nothing that another site has a browser send names anybody
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert said.count("<script>") >= 4


async def test_threat_31_another_sites_script_gets_no_answer(live: Live) -> None:
    """It has no key, and no leave to send one along."""
    site = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    wish = {**site, "Access-Control-Request-Headers": "authorization"}
    async with live.http.options("/v1/chat/completions", headers=wish) as answer:
        assert answer.status == 401
        assert "Access-Control-Allow-Origin" not in answer.headers
    async with live.http.post("/v1/chat/completions", data="{}", headers=site) as answer:
        assert answer.status == 401
    assert live.engine.requests == []
