"""The connection to the broker: when it is acknowledged, how it is refused, and what becomes of it when it breaks."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import trustme
from broker import PASSWORD, Mosquitto, free_port, mosquitto
from live import Live, Start, connected

from persona.errors import ConfigurationError
from persona.ingest import connection, discovery
from persona.settings import Mqtt

EVENT = "persona/u/{}/events/{}"


async def tell(broker: Mosquitto, *bodies: Any, name: str = "ann", kind: str = "message", **how: Any) -> None:
    async with broker.client(name) as client:
        for body in bodies:
            content = body if isinstance(body, bytes) else json.dumps(body)
            await client.publish(EVENT.format(name, kind), content, qos=1, **how)


async def counted(live: Live, name: str, number: int) -> None:
    """Wait until so many messages ended like that."""
    async with asyncio.timeout(15):
        while live.services.intake.counts[name] < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def trouble(live: Live, word: str) -> str:
    """What the service says of its broker, once it says that word."""
    assert live.house.mqtt is not None
    async with asyncio.timeout(15):
        while word not in (live.house.mqtt.trouble() or ""):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return live.house.mqtt.trouble() or ""


async def test_an_event_is_acknowledged_only_after_it_is_committed(begin: Start, broker: Mosquitto) -> None:
    """While the disk is full the broker keeps the events; when there is space they are stored."""
    live = await begin()
    await tell(broker, {"id": 0, "text": "before"})
    await counted(live, "stored", 1)
    await limit_pages(live, full=True)
    await tell(broker, *({"id": number, "text": f"number {number} " + "x" * 2000} for number in range(1, 40)))
    assert "disk is full" in await trouble(live, "full")
    assert len(await live.history()) < 40
    answer = await live.say("are you there? " + "x" * 3500)
    assert answer["persona"]["recorded"] is False, "chat goes on, unrecorded"
    async with broker.client("ann") as client:
        await client.subscribe("persona/u/ann/chat", qos=1)
        await client.publish("persona/u/ann/chat/set", json.dumps({"text": "and here? " + "x" * 3500}), qos=1)
        async with asyncio.timeout(10):
            told = json.loads((await anext(aiter(client.messages))).payload)  # type: ignore[arg-type]
    assert told["persona"]["recorded"] is False, "over MQTT too, though events wait"
    await limit_pages(live, full=False)
    await counted(live, "stored", 40)
    assert live.house.mqtt is not None
    assert live.house.mqtt.trouble() is None
    texts = [text for _, text in await live.history() if text.startswith("number")]
    assert len(texts) == len(set(texts)) == 39


async def limit_pages(live: Live, *, full: bool) -> None:
    """Let the database file grow no further than it is, or freely again."""
    async with live.services.database.write() as connection:
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
    async with live.services.database.write() as connection:
        await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages if full else 1_000_000}")


async def test_threat_23_events_that_a_full_disk_refused_come_again_after_a_stop(
    start: Start, begin: Start, broker: Mosquitto, tmp_path: Path
) -> None:
    live = await begin()
    user = await live.user("ann")
    await limit_pages(live, full=True)
    await tell(broker, *({"id": number, "text": "x" * 3000} for number in range(30)))
    await trouble(live, "full")
    await live.stack.aclose()  # the service stops with events that it could not store
    async with broker.client("homeassistant") as client:
        await client.subscribe("persona/svc/status")
        async with asyncio.timeout(10):
            assert (await anext(aiter(client.messages))).payload == discovery.OFFLINE.encode()
    again = await connected(await start(mqtt=broker.settings()))
    await counted(again, "stored", 1)
    async with asyncio.timeout(15):
        while await again.services.history.last_id(user.id) < 30:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_threat_21_the_same_event_twice_has_the_effect_of_one(begin: Start, broker: Mosquitto) -> None:
    live = await begin()
    same_id = {"id": "a", "text": "one"}
    same_time = {"ts": 1_790_000_000, "text": "two"}
    await tell(broker, same_id, same_id, same_time, same_time, {"id": "a", "text": "another text, the same id"})
    await tell(broker, {"text": "three"}, {"text": "three"})
    await counted(live, "stored", 4)
    await counted(live, "duplicate", 3)
    assert [text for _, text in await live.history()] == ["one", "two", "three", "three"]


async def test_threat_22_a_retained_replay_is_counted_and_is_no_news(start: Start, broker: Mosquitto) -> None:
    await tell(broker, {"text": "said long ago"}, retain=True)
    live = await start(mqtt=broker.settings())
    await live.key("ann")
    await counted(await connected(live), "retained", 1)
    assert await live.history() == []
    (letter,) = await live.services.events.letters(None)
    assert (letter.reason, letter.payload) == ("retained", None)


async def test_an_unknown_users_events_wait_among_the_dead_and_a_forgotten_ones_leave_no_trace(
    begin: Start, broker: Mosquitto
) -> None:
    live = await begin()
    await tell(broker, {"id": 1, "text": "I am early"}, name="bob")
    await counted(live, "unknown_user", 1)
    await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
    await tell(broker, {"id": 2, "text": "late-canary"})
    await counted(live, "forgotten", 1)
    known, forgotten = await live.services.events.letters(None)
    assert (known.name, known.payload) == ("bob", b'{"id": 1, "text": "I am early"}')
    assert (forgotten.name, forgotten.payload, forgotten.user_id) == ("", None, None)
    assert await live.services.users.get("ann") is None
    await live.services.database.scrub()
    files = [file for file in live.services.settings.home.rglob("*") if file.is_file()]
    assert not [file for file in files if b"late-canary" in file.read_bytes()]


async def test_a_payload_above_the_limit_is_refused_without_being_kept(begin: Start, broker: Mosquitto) -> None:
    live = await begin(mqtt={"max_payload": 1000})
    await tell(broker, {"text": "x" * 50_000}, {"text": "short"})
    await counted(live, "stored", 1)
    (letter,) = await live.services.events.letters(None)
    assert (letter.reason, letter.payload) == ("too_large", None)


@pytest.mark.parametrize("kind", ["Kind", "a/b", "x" * 65])
async def test_a_topic_that_names_no_kind_is_a_dead_letter(begin: Start, broker: Mosquitto, kind: str) -> None:
    live = await begin()
    await tell(broker, {"text": "x"}, kind=kind)
    await counted(live, "bad_topic", 1)


async def test_a_wrong_password_is_told_in_a_sentence_and_tried_again(
    start: Start, broker: Mosquitto, tmp_path: Path
) -> None:
    settings = broker.settings()
    Path(settings["password_file"]).write_text("wrong")
    live = await start(mqtt=settings)
    assert "mqtt.password_file" in await trouble(live, "refuses")
    await live.say("chat works without a broker")


async def test_a_password_file_that_is_missing_stops_the_start(start: Start, broker: Mosquitto) -> None:
    with pytest.raises(ConfigurationError, match=r"check mqtt\.password_file"):
        await start(mqtt=broker.settings(password_file="/nowhere/password"))


def test_the_password_comes_from_systemds_credentials_when_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mqtt-password").write_text("from systemd\n")
    assert connection.password(Mqtt(), str(tmp_path)) == "from systemd"
    assert connection.password(Mqtt(), None) is None


@pytest.mark.parametrize("prefix", ["", "a/+", "#", "/a", "a/", "$SYS"])
async def test_a_prefix_that_no_topic_can_have_stops_the_start(start: Start, broker: Mosquitto, prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=r"mqtt\.prefix"):
        await start(mqtt=broker.settings(prefix=prefix))


async def test_our_configuration_loads_beneath_debians_own(tmp_path: Path) -> None:
    """What Debian's mosquitto.conf says before it includes conf.d, where our snippet goes."""
    (tmp_path / "store").mkdir()
    debian = f"persistence true\npersistence_location {tmp_path}/store/\ninclude_dir {tmp_path}/conf.d\n"
    ours = Mosquitto(tmp_path / "ours")
    (tmp_path / "conf.d").mkdir()
    location = f"persistence_location {tmp_path}/ours/store/\n"  # the only line that the test adds to the snippet
    text = (tmp_path / "ours/mosquitto.conf").read_text()
    assert location in text
    (tmp_path / "conf.d/persona.conf").write_text(text.replace(location, ""))
    (tmp_path / "ours/mosquitto.conf").write_text(debian)
    await ours.start()
    async with ours.client("ann") as client:
        await client.publish(EVENT.format("ann", "note"), "1", qos=1)
    await ours.kill()


async def test_a_session_that_the_broker_lost_is_noticed(begin: Start, broker: Mosquitto) -> None:
    live = await begin()
    await broker.kill()
    for file in (broker.folder / "store").iterdir():
        file.unlink()
    await broker.start()
    mqtt = live.house.mqtt
    assert mqtt is not None
    async with asyncio.timeout(20):
        while mqtt.counts["connections"] < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert mqtt.counts["sessions_lost"] == 1
    await tell(broker, {"text": "all is well again"})
    await counted(live, "stored", 1)


async def test_numbers_of_a_lost_session_make_no_event_of_the_next_one_a_repetition(
    begin: Start, broker: Mosquitto
) -> None:
    live = await begin()
    before = live.services.settings.mqtt_client.read_text()
    await broker.kill()
    for file in (broker.folder / "store").iterdir():
        file.unlink()
    await broker.start()
    mqtt = live.house.mqtt
    assert mqtt is not None
    async with asyncio.timeout(20):
        while (after := live.services.settings.mqtt_client.read_text()) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert mqtt.counts["sessions_lost"] == 1
    assert after.split()[0] == before.split()[0]
    assert after.split()[1] != before.split()[1]


async def test_a_session_that_the_broker_kept_brings_what_came_meanwhile(
    begin: Start, start: Start, broker: Mosquitto
) -> None:
    live = await begin()
    identifier = live.services.settings.mqtt_client.read_text()
    await live.stack.aclose()
    await tell(broker, *({"id": number, "text": f"while away {number}"} for number in range(30)))
    again = await connected(await start(mqtt=broker.settings()))
    await counted(again, "stored", 30)
    assert again.services.settings.mqtt_client.read_text() == identifier
    assert len(identifier) > 24, "nobody takes the session over by guessing its name"


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[tuple[Mosquitto, trustme.CA]]:
    """A broker that speaks TLS alone."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    folder = tmp_path / "tls"
    folder.mkdir()
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    port = free_port()
    changes = f"listener {port} 127.0.0.1\ncertfile {folder}/cert.pem\nkeyfile {folder}/key.pem\n"
    async with mosquitto(tmp_path / "broker", changes=changes) as running:
        running.port = port
        yield running, authority


async def test_the_connection_is_encrypted_when_the_settings_say_so(
    start: Start, secure: tuple[Mosquitto, trustme.CA], tmp_path: Path
) -> None:
    broker, authority = secure
    live = await start(mqtt=broker.settings(tls=True, ca_file=str(tmp_path / "tls/ca.pem")))
    await live.key("ann")
    await connected(live)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with broker.client("ann", tls_context=context) as client:
        await client.publish(EVENT.format("ann", "message"), '{"text": "under seal"}', qos=1)
    await counted(live, "stored", 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho drops a socket that it gave up
async def test_a_broker_whose_certificate_nobody_vouches_for_is_not_trusted(
    start: Start, secure: tuple[Mosquitto, trustme.CA]
) -> None:
    broker, _ = secure
    live = await start(mqtt=broker.settings(tls=True))
    await asyncio.sleep(1.0)
    assert live.house.mqtt is not None
    assert live.house.mqtt.trouble()
    assert not live.house.mqtt.connected


async def test_certificates_that_cannot_be_read_stop_the_start(start: Start, broker: Mosquitto) -> None:
    with pytest.raises(ConfigurationError, match=r"mqtt\.ca_file"):
        await start(mqtt=broker.settings(tls=True, ca_file="/nowhere/ca.pem"))


async def test_threat_22_a_stranger_who_takes_our_session_over_gets_no_second_effect(
    begin: Start, broker: Mosquitto
) -> None:
    """Two clients of one name throw each other out; whatever happens, each event counts once and is not lost."""
    live = await begin()
    identifier = live.services.settings.mqtt_client.read_text().split()[0]
    await tell(broker, {"id": 1, "text": "first"})
    await counted(live, "stored", 1)
    taken = aiomqtt.Client(
        "127.0.0.1", broker.port, username="persona", password=PASSWORD.format("persona"), identifier=identifier
    )
    async with taken:
        await asyncio.sleep(0.3)
    await connected(live)
    await asyncio.sleep(1.0)
    await connected(live)
    await tell(broker, {"id": 1, "text": "first"}, {"id": 2, "text": "second"})
    await counted(live, "stored", 2)
    assert [text for _, text in await live.history()] == ["first", "second"]
