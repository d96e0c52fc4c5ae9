"""The name of our session at the broker outlives a full disk and a power cut, or its loss is told."""

import asyncio
import errno
import json
from pathlib import Path

import pytest
from broker import Mosquitto
from live import Live, Start, connected

from persona.errors import ConfigurationError, StorageFull
from persona.ingest.session import Session
from storage import files


class Disk:
    """A disk that is full from time to time: then nothing comes to rest on it."""

    def __init__(self) -> None:
        self.full = False

    def sync(self, path: Path) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(files, "sync", made.sync)
    return made


async def trouble(live: Live) -> str:
    """What the service says of its broker, once that is more than nothing."""
    assert live.house.mqtt is not None
    async with asyncio.timeout(15):
        while "has not answered yet" in (live.house.mqtt.trouble() or ""):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return live.house.mqtt.trouble() or ""


async def tell(broker: Mosquitto, text: str) -> None:
    async with broker.client("ann") as client:
        await client.publish("persona/u/ann/events/message", json.dumps({"text": text}), qos=1)


async def heard(live: Live, *texts: str) -> None:
    async with asyncio.timeout(15):
        while [text for _, text in await live.history()] != list(texts):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def test_a_name_is_the_same_at_every_start_and_its_nonce_comes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "mqtt-client"
    first = Session.load(file, "my house/persona")
    assert (first.known, first.damaged, file.exists()) == (False, False, False)
    first.keep()
    named = Session.load(file, "other")
    assert (named.identifier, named.known) == (first.identifier, False), "the broker may not have heard it"
    assert file.stat().st_mode & 0o777 == 0o600
    named.renew()
    assert Session.load(file, "other") == Session(file, first.identifier, named.nonce, stored=True)


def test_what_an_earlier_persona_wrote_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mqtt-client"
    file.write_text(f"persona-{'ab' * 12} {'01' * 8}\n")
    assert Session.load(file, "persona") == Session(file, f"persona-{'ab' * 12}", b"\x01" * 8, stored=True)


def test_nothing_is_taken_for_written_that_is_not(tmp_path: Path, disk: Disk) -> None:
    session = Session.load(tmp_path / "mqtt-client", "persona")
    disk.full = True
    with pytest.raises(StorageFull):
        session.keep()
    assert not session.stored
    disk.full = False
    session.keep()
    session.renew()
    before = session.nonce
    disk.full = True
    with pytest.raises(StorageFull):
        session.renew()
    assert session.nonce == before, "events are stored under what a restart will read"
    assert Session.load(session.file, "persona").nonce == before


@pytest.mark.parametrize("content", [b"", b"\0" * 42, b"persona", b"persona-\xff", b"a b c", b"persona-0123 45\n"])
def test_a_file_that_says_nothing_is_a_lost_session(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "mqtt-client"
    file.write_bytes(content)
    session = Session.load(file, "persona")
    assert (session.damaged, session.known, session.stored) == (True, False, False)
    session.keep()
    assert not Session.load(file, "persona").damaged


def test_a_file_that_may_not_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Session.load(tmp_path, "persona")


async def test_no_session_begins_whose_name_a_full_disk_refused(start: Start, broker: Mosquitto, disk: Disk) -> None:
    """What waits for a session whose name nobody remembers would never come, and nobody would miss it."""
    disk.full = True
    live = await start(mqtt=broker.settings())
    await live.key("ann")
    assert "cannot be written" in await trouble(live)
    assert live.house.mqtt is not None
    assert live.house.mqtt.counts["connections"] == 0
    disk.full = False
    await connected(live)
    await live.stack.aclose()
    await tell(broker, "while away")
    again = await connected(await start(mqtt=broker.settings()))
    again.keys.update(live.keys)
    await heard(again, "while away")
    assert again.house.mqtt is not None
    assert again.house.mqtt.counts["sessions_lost"] == 0


async def test_no_event_is_taken_in_under_a_nonce_that_a_full_disk_refused(
    begin: Start, broker: Mosquitto, disk: Disk
) -> None:
    """The broker delivers again under it after a restart, and what has no name would count twice."""
    live = await begin()
    file = live.services.settings.mqtt_client
    before = file.read_text()
    await broker.kill()
    for stored in (broker.folder / "store").iterdir():
        stored.unlink()
    disk.full = True
    await broker.start()
    mqtt = live.house.mqtt
    assert mqtt is not None
    async with asyncio.timeout(20):
        while mqtt.counts["connections"] < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not mqtt.connected
    assert file.read_text() == before
    disk.full = False
    await connected(live)
    assert mqtt.counts["sessions_lost"] == 1, "once, however often it was tried"
    assert file.read_text().split()[0] == before.split()[0]
    assert file.read_text() != before
    await tell(broker, "all is well again")
    await heard(live, "all is well again")


async def test_an_empty_file_is_told_as_a_lost_session(begin: Start, start: Start, broker: Mosquitto) -> None:
    live = await begin()
    file = live.services.settings.mqtt_client
    await live.stack.aclose()
    file.write_bytes(b"")
    again = await connected(await start(mqtt=broker.settings()))
    assert again.house.mqtt is not None
    assert again.house.mqtt.counts["sessions_lost"] == 1
    assert len(file.read_text().split()) == 2
