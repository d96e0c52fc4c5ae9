"""Nothing is lost and nothing counts twice, whoever is killed, floods, or is away for an hour."""

import asyncio
import json
from random import Random

import aiohttp
from broker import Mosquitto
from served import Served, acknowledged, flood

STORED = "SELECT count(*) FROM entries WHERE role = 'user'"
TEXTS = "SELECT text FROM entries WHERE role = 'user' ORDER BY id"
DEAD = "SELECT sum(count) FROM dead_letters"


async def test_threat_21_two_thousand_events_survive_kills_of_the_broker_and_of_the_service(
    broker: Mosquitto, served: Served
) -> None:
    """Each is stored once, and each that is no event is a dead letter. Mosquitto itself may lose what it acknowledged
    in the last moments before a kill: a device that reads its receipts sends it again.
    """
    events, every, random = 2000, 20, Random(7)
    await served.start()
    options = ("--rate", "160", "--bad", str(every), "--source", "phone", "--careful", "--patience", "120")
    publisher = await flood(broker, "ann", events, *options)
    kills = ["broker"] * 5 + ["service"] * 4
    random.shuffle(kills)
    for victim in kills:
        await asyncio.sleep(random.uniform(0.5, 1.5))
        if victim == "broker":
            await broker.restart()
        else:
            await served.kill()
            await served.start()
    assert await acknowledged(publisher) == events
    good = {f"this is m{number}" for number in range(events) if number % every}
    await served.until(STORED, len(good))
    assert await served.stop() == 0
    texts = [text for (text,) in served.rows(TEXTS)]
    assert len(texts) == len(set(texts)), "an event was stored twice"
    assert set(texts) == good
    assert served.count("SELECT count(*) FROM events") == len(good)
    assert served.rows("SELECT events, missing FROM sources WHERE source = 'phone'") == [(len(good), 0)]
    told = [payload.decode() for (payload,) in served.rows("SELECT payload FROM dead_letters")]
    assert set(told) <= {f"m{number} is no JSON" for number in range(0, events, every)}
    assert len(set(told)) >= events // every - 10, "what the broker lost of them is all that is missing"


async def test_threat_21_what_a_killed_broker_loses_of_a_plain_device_is_missed_to_the_number(
    broker: Mosquitto, served: Served
) -> None:
    events, random = 600, Random(3)
    await served.start()
    await served.settled()
    publisher = await flood(broker, "ann", events, "--rate", "150", "--source", "plain", "--patience", "60")
    for _ in range(3):
        await asyncio.sleep(random.uniform(0.5, 1.0))
        await broker.restart()
    assert await acknowledged(publisher) == events
    assert await acknowledged(await flood(broker, "bob", 1, "--prefix", "end")) == 1
    await served.until("SELECT count(*) FROM entries WHERE text LIKE '%end%'", 1)
    await served.settled()
    ((stored, missing, gaps),) = served.rows("SELECT events, missing, gaps FROM sources WHERE source = 'plain'")
    assert stored + missing == events
    assert sum(last - first + 1 for first, last in json.loads(gaps)) == missing
    assert await served.stop() == 0


async def test_threat_20_the_backlog_of_an_hours_outage_drains_and_the_counts_are_equal(
    broker: Mosquitto, served: Served
) -> None:
    """An event a second for an hour: 3,600 wait at the broker, which is killed meanwhile and has them still."""
    await served.start()
    await served.until("SELECT count(*) FROM users", 2)
    await served.settled()
    assert await served.stop() == 0
    assert await acknowledged(await flood(broker, "ann", 3600, "--source", "clock")) == 3600
    await broker.restart()
    await served.start()
    await served.until(STORED, 3600)
    assert served.count("SELECT count(DISTINCT text) FROM entries") == 3600
    assert served.rows("SELECT source, events, missing, duplicates FROM sources") == [("clock", 3600, 0, 0)]
    assert served.count(DEAD) == 0
    assert await served.stop() == 0


async def test_threat_20_the_service_answers_while_the_broker_is_away_and_connects_again(
    broker: Mosquitto, served: Served
) -> None:
    await broker.kill()
    await served.start()
    async with aiohttp.ClientSession(served.url) as session, session.get("/health") as answer:
        assert answer.status == 200
    await broker.start()
    assert await acknowledged(await flood(broker, "ann", 50)) == 50
    await served.until("SELECT count(*) FROM users", 2)
    assert await acknowledged(await flood(broker, "bob", 50, "--prefix", "late")) == 50
    await served.settled()
    assert await acknowledged(await flood(broker, "bob", 50, "--prefix", "later")) == 50
    await served.until("SELECT count(*) FROM entries WHERE text LIKE '%later%'", 50)
    assert await served.stop() == 0


async def test_threat_19_a_flood_of_one_user_costs_a_bounded_memory_and_the_other_nothing(
    broker: Mosquitto, served: Served
) -> None:
    served.change(events_per_second=50, burst=500, qos0_waiting=2000)
    await served.start()
    await served.settled()
    before = served.memory()
    flooding = await flood(broker, "ann", 30_000, "--qos", "0")
    trickle = await flood(broker, "bob", 40, "--rate", "20", "--prefix", "calm")
    assert await acknowledged(trickle) == 40
    await acknowledged(flooding)
    await served.until("SELECT count(*) FROM entries WHERE text LIKE '%calm%'", 40)
    await served.settled()
    assert served.memory() - before < 96 << 20
    stored = served.count("SELECT count(*) FROM entries WHERE text NOT LIKE '%calm%'")
    letters = served.rows("SELECT name, reason, count, payload FROM dead_letters")
    assert 500 <= stored < 5000
    assert {(name, payload) for name, _, _, payload in letters} == {("ann", None)}
    assert {reason for _, reason, _, _ in letters} <= {"rate", "overflow"}
    assert len(letters) <= 6, "a flood costs a row per reason and minute"
    assert stored + sum(count for _, _, count, _ in letters) <= 30_000
    assert sum(count for _, _, count, _ in letters) > 10_000
    assert await served.stop() == 0
