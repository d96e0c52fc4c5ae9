"""Who gets an answer: nobody without a key but on the public list, and nobody anything of somebody else's."""

import stat
from typing import Any

import pytest
from aiohttp import web
from live import Live, Start

from persona.api import auth, routes
from persona.api.auth import Failures
from persona.errors import Busy
from persona.events import Delivery
from storage.events import Outcome


def paths(application: web.Application) -> list[tuple[str, str]]:
    """Every route as (method, path), with something in the place of each variable."""
    values = {"{model}": "persona", "{name}": "ann", "{id}": "1", "{key}": "pk-wrong"}
    found = []
    for route in application.router.routes():
        if route.resource is not None and route.method != "HEAD":
            parts = route.resource.canonical.split("/")
            found.append((route.method, "/".join(values.get(part, part) for part in parts)))
    return found


def is_ollamas(path: str) -> bool:
    return path.startswith(("/api/", "/key/"))


async def test_threat_01_every_route_without_a_key_is_refused_but_the_public_list(start: Start) -> None:
    live = await start(http={"failures_per_minute": 1000})
    walked = paths(routes.public_application(live.services))
    assert len(walked) >= 30
    answered = set()
    for method, path in walked:
        async with live.http.request(method, path) as answer:
            if answer.status == 401:
                error = (await answer.json())["error"]
                assert isinstance(error, str) if is_ollamas(path) else error["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            else:
                answered.add(path)
    assert answered == {"/health", "/ready", "/metrics"} == auth.PUBLIC | auth.LOOPBACK


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer pk-wrong", "Basic YTpi", "Bearer k\xe9y", "bearer " + "x" * 4000, "pk-wrong"],
)
async def test_threat_01_a_wrong_key_is_refused(live: Live, header: str) -> None:
    async with live.http.get("/v1/me", headers={"Authorization": header}) as answer:
        assert answer.status == 401


async def test_threat_01_a_path_that_does_not_exist_tells_nothing_without_a_key(live: Live) -> None:
    await live.call("GET", "/v1/nothing", user=None, status=401)
    await live.call("GET", "/v1/nothing", status=404)


async def test_threat_01_metrics_are_open_on_the_loopback_only(live: Live) -> None:
    assert auth._is_loopback("127.0.0.1")
    assert auth._is_loopback("::1")
    assert auth._is_loopback("::ffff:127.0.0.1")  # of a socket that serves both kinds
    assert not auth._is_loopback("192.168.1.5")
    assert not auth._is_loopback("::ffff:192.168.1.5")
    assert not auth._is_loopback(None)
    async with live.http.get("/metrics") as answer:
        assert answer.status == 200


async def test_a_method_that_a_path_does_not_have_is_a_405_in_json(live: Live) -> None:
    body = await live.call("PUT", "/v1/me", status=405)
    assert body["error"]["code"] == "method_not_allowed"


async def test_a_revoked_key_stops_working_at_once(live: Live) -> None:
    key = await live.key()
    await live.call("GET", "/v1/me")
    async with live.admin.delete("/admin/users/ann/keys/1") as answer:
        assert answer.status == 200
    await live.call("GET", "/v1/me", status=401)
    assert key.startswith("pk-")


async def test_threat_35_a_hundred_bad_keys_end_in_429(live: Live) -> None:
    statuses = []
    for number in range(100):
        async with live.http.get("/v1/me", headers={"Authorization": f"Bearer pk-{number}"}) as answer:
            statuses.append(answer.status)
            if answer.status == 429:
                assert int(answer.headers["retry-after"]) <= 60
                assert (await answer.json())["error"]["type"] == "rate_limit_error"
    assert statuses == [401] * 20 + [429] * 80


async def test_threat_35_a_good_key_from_the_same_address_still_works(live: Live) -> None:
    key = await live.key()
    for _ in range(30):
        async with live.http.get("/v1/me", headers={"Authorization": "Bearer pk-bad"}):
            pass
    async with live.http.get("/v1/me", headers={"Authorization": f"Bearer {key}"}) as answer:
        assert answer.status == 200


async def test_threat_35_the_last_use_of_a_key_is_shown_and_its_secret_never(live: Live) -> None:
    key = await live.key()
    me = await live.call("GET", "/v1/me")
    assert me["keys"][0]["last_used"] is not None
    assert key not in str(me)


async def test_threat_35_a_key_is_rotated_by_a_new_one_and_a_revocation(live: Live) -> None:
    await live.key()
    async with live.admin.post("/admin/users/ann/keys", json={"label": "phone"}) as answer:
        made = await answer.json()
    await live.admin.delete("/admin/users/ann/keys/1")
    live.keys["ann"] = made["key"]
    me = await live.call("GET", "/v1/me")
    assert [(key["label"], key["revoked"] is None) for key in me["keys"]] == [("first", False), ("phone", True)]


def test_the_window_of_wrong_keys_ends_after_a_minute() -> None:
    now = [0.0]
    failures = Failures(2, lambda: now[0])
    failures.note("10.0.0.1")
    failures.note("10.0.0.1")
    with pytest.raises(Busy) as caught:
        failures.note("10.0.0.1")
    assert caught.value.retry_after == 60
    failures.note("10.0.0.2")
    now[0] = 60.0
    failures.note("10.0.0.1")


def test_one_ipv6_household_has_one_window_and_memory_stays_bounded() -> None:
    failures = Failures(1, lambda: 0.0)
    failures.note("2001:db8::1")
    with pytest.raises(Busy):
        failures.note("2001:db8::2")
    failures.note("::ffff:192.168.1.5")
    failures.note("::ffff:192.168.1.6")  # another household, though its upper half is the same
    with pytest.raises(Busy):
        failures.note("192.168.1.6")
    for number in range(10_000):
        failures.note(f"address {number}")
    assert len(failures._windows) == auth._ADDRESSES


async def test_threat_03_admin_routes_do_not_exist_on_tcp(live: Live) -> None:
    public = {path for _, path in paths(routes.public_application(live.services))}
    for method, path in paths(routes.admin_application(live.services)):
        if path not in public:
            await live.call(method, path, status=404, json={})


async def test_threat_03_the_user_header_means_nothing_on_tcp(live: Live) -> None:
    await live.say("my secret", user="bob")
    page = await live.call("GET", "/v1/me/history", user="ann", headers={"x-persona-user": "bob"})
    assert page["data"] == []
    await live.call("GET", "/v1/me", user=None, headers={"x-persona-user": "bob"}, status=401)


async def test_threat_03_the_admin_socket_is_its_owners_alone(live: Live) -> None:
    settings = live.services.settings
    assert stat.S_IMODE(settings.admin_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.run_dir.stat().st_mode) == 0o700


async def test_on_the_admin_socket_a_header_names_the_user(live: Live) -> None:
    await live.key("bob")
    async with live.admin.get("/v1/me", headers={"x-persona-user": "bob"}) as answer:
        assert (await answer.json())["name"] == "bob"
    async with live.admin.get("/v1/me") as answer:
        assert answer.status == 401
    async with live.admin.get("/v1/me", headers={"x-persona-user": "nobody"}) as answer:
        assert answer.status == 404


# What bob owns and what nobody owns, by the method and the path of every route with a variable.
OWNED: dict[tuple[str, str], tuple[str, str]] = {
    ("GET", "/v1/models/{model}"): ("/v1/models/persona@1", "/v1/models/persona@999"),
    ("DELETE", "/v1/me/history/{id}"): ("/v1/me/history/1", "/v1/me/history/999"),
    ("DELETE", "/v1/me/events/dead/{id}"): ("/v1/me/events/dead/1", "/v1/me/events/dead/999"),
    ("DELETE", "/v1/me/facts/{kind}/{key}"): ("/v1/me/facts/fact/diet", "/v1/me/facts/fact/nothing"),
    ("GET", "/v1/me/runs/{id}"): ("/v1/me/runs/1", "/v1/me/runs/999"),
}
# The same for bodies, by the path to which they are sent.
HI = [{"role": "user", "content": "x"}]
OWNED_BODIES: list[tuple[str, Any, Any]] = [
    ("/v1/feedback", {"turn": 2, "rating": 1}, {"turn": 999, "rating": 1}),
    ("/v1/me/why", {"run": 1}, {"run": 999}),
    ("/v1/me/why", {"model": "persona@1", "messages": HI}, {"model": "persona@999", "messages": HI}),
    ("/v1/me/rollback", {"version": 1}, {"version": 999}),
    ("/v1/me/events/dead/replay", {"ids": [1]}, {"ids": [999]}),
    ("/v1/chat/completions", {"model": "persona@1", "messages": HI}, {"model": "persona@999", "messages": HI}),
    ("/v1/completions", {"model": "persona@1", "prompt": "x"}, {"model": "persona@999", "prompt": "x"}),
    (
        "/api/chat",
        {"model": "persona@1:latest", "messages": HI, "stream": False},
        {"model": "persona@999", "messages": HI, "stream": False},
    ),
    (
        "/api/generate",
        {"model": "persona@1", "prompt": "x", "stream": False},
        {"model": "persona@999:latest", "prompt": "x", "stream": False},
    ),
    ("/api/generate", {"model": "persona@1"}, {"model": "persona@999"}),
    ("/api/show", {"model": "persona@1"}, {"model": "persona@999:latest"}),
]
# Routes in which nothing can be named that somebody owns: what they take is the caller's own words or wish.
NAMELESS = {
    ("POST", "/v1/me/history"),
    ("POST", "/v1/me/events/{kind}"),
    ("POST", "/v1/me/train"),
    ("POST", "/v1/me/pause"),
    ("POST", "/v1/me/resume"),
    ("POST", "/v1/me/forget"),
    ("POST", "/api/pull"),
}


async def test_threat_02_every_route_that_can_name_something_is_in_the_matrix(live: Live) -> None:
    """Whoever adds a route with an id, or with a body, says here what of another's it could name."""
    found = set()
    for route in routes.public_application(live.services).router.routes():
        assert route.resource is not None
        path = route.resource.canonical.removeprefix(f"{auth.KEYED}/{{key}}")  # the same handlers with or without
        if route.method not in ("GET", "HEAD") or ("{" in path and route.method != "HEAD"):
            found.add((route.method, path))
    tested = OWNED.keys() | {("POST", path) for path, _, _ in OWNED_BODIES}
    assert found == tested | NAMELESS
    assert not tested & NAMELESS


async def bobs_things(live: Live) -> None:
    """A turn and its reply (1, 2), a version (1), a run (1), a dead letter (1) and a fact (diet)."""
    await live.say("hi", user="bob")
    await live.publish("bob")
    await live.call("POST", "/v1/me/train?wait=20", user="bob")
    await live.call("POST", "/v1/me/events/fact", user="bob", status=201, json={"key": "diet", "value": "vegan"})
    assert await live.services.intake.accept([Delivery("bob", "message", b"{")]) == [Outcome.DEAD]
    await live.key("ann")


async def test_threat_02_what_is_anothers_has_the_answer_of_what_does_not_exist(live: Live) -> None:
    await bobs_things(live)
    for (method, _), (foreign, unknown) in OWNED.items():
        first = await live.call(method, foreign, user="ann", status=404)
        assert first == await live.call(method, unknown, user="ann", status=404)
    for path, foreign_body, unknown_body in OWNED_BODIES:
        first = await live.call("POST", path, user="ann", status=404, json=foreign_body)
        assert first == await live.call("POST", path, user="ann", status=404, json=unknown_body)


async def test_threat_02_the_owner_and_the_admin_reach_what_is_the_owners(live: Live) -> None:
    await bobs_things(live)
    for path, own, _ in OWNED_BODIES:
        await live.call("POST", path, user="bob", status=200, json=own)
        async with live.admin.post(path, json=own, headers={"x-persona-user": "bob"}) as answer:
            assert answer.status == 200
    for (method, _), (mine, _) in reversed(OWNED.items()):
        await live.call(method, mine, user="bob", status=200)


async def test_threat_02_anothers_conversation_id_opens_a_conversation_of_ones_own(live: Live) -> None:
    await live.say("bob's secret", user="bob", metadata={"conversation_id": "shared-name"})
    await live.say("hello", user="ann", metadata={"conversation_id": "shared-name"})
    assert await live.history("ann") == [("user", "hello"), ("assistant", "Hello.")]
    assert len(await live.history("bob")) == 2
    assert b"secret" not in bytes(token for token in live.engine.requests[-1].tokens if token < 256)


async def test_ids_that_are_no_numbers_are_404(start: Start) -> None:
    live = await start()
    for path in ("/v1/me/runs/abc", "/v1/me/runs/-1", "/v1/me/runs/9" + "9" * 30, "/v1/me/runs/1%00"):
        await live.call("GET", path, status=404)
