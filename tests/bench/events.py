"""What it costs not to lose an event: persona beside a bare loop that acknowledges on arrival and stores nothing.

    .venv/bin/python tests/bench/events.py [--rounds 5] [--events 3000] [--plain]

A publisher in a process of its own sends events of QoS 1 through a real Mosquitto; the time runs from its start to the
last event committed (persona) or received (the bare aiomqtt loop). The two sides take turns. --plain has the broker
persist nothing, so that the broker is not what is measured. One JSON line a side, medians and spread.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import aiomqtt
from broker import PASSWORD, Mosquitto, mosquitto

from persona import app, logs
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.settings import Settings

TOPIC = "persona/u/ann/events/message"
Side = Callable[[Mosquitto, int, str], Awaitable[float]]


async def flood(broker: Mosquitto, count: int, prefix: str) -> asyncio.subprocess.Process:
    script = Path(__file__).parent.parent / "flood.py"
    arguments = (str(broker.port), "ann", PASSWORD.format("ann"), str(count), "--prefix", prefix)
    return await asyncio.create_subprocess_exec(
        sys.executable, str(script), *arguments, stdout=asyncio.subprocess.DEVNULL
    )


async def bare(broker: Mosquitto, count: int, prefix: str) -> float:
    """The loop of aiomqtt's own documentation: events a second."""
    async with broker.client("persona", identifier="bare", protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(TOPIC, qos=1)
        publisher = await flood(broker, count, prefix)
        started, seen = 0.0, 0
        async for _ in client.messages:
            started = started or time.perf_counter()
            seen += 1
            if seen == count:
                break
        seconds = time.perf_counter() - started
        await publisher.wait()
    return count / seconds


def persona(house: app.House) -> Side:
    async def side(broker: Mosquitto, count: int, prefix: str) -> float:
        counts = house.services.intake.counts
        before = counts["stored"]
        publisher = await flood(broker, count, prefix)
        while counts["stored"] == before:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        started, first = time.perf_counter(), counts["stored"] - before
        while counts["stored"] < before + count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        seconds = time.perf_counter() - started
        await publisher.wait()
        return (count - first) / seconds

    return side


def report(measure: str, figures: list[float], digits: int = 0) -> None:
    low, middle, high = min(figures), statistics.median(figures), max(figures)
    line = {"measure": measure, "median": round(middle, digits), "min": round(low, digits), "max": round(high, digits)}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def measure(arguments: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # One broker a side, of the same configuration, so that neither has the other's messages to carry.
        own, other = [await stack.enter_async_context(broker(folder / name, arguments.plain)) for name in ("a", "b")]
        house = await stack.enter_async_context(served(folder, own))
        side = persona(house)
        ours, theirs = [], []
        for number in range(arguments.rounds):
            ours.append(await side(own, arguments.events, f"r{number}-"))
            theirs.append(await bare(other, arguments.events, f"r{number}-"))
        report("persona, committed events/s", ours)
        report("bare loop, received events/s", theirs)
        report("ratio", [a / b for a, b in zip(ours, theirs, strict=True)], 2)


@asynccontextmanager
async def broker(folder: Path, plain: bool) -> AsyncIterator[Mosquitto]:
    async with mosquitto(folder) as running:
        if plain:
            config = folder / "mosquitto.conf"
            config.write_text(config.read_text().replace("persistence true", "persistence false"))
            await running.restart()
        yield running


@asynccontextmanager
async def served(folder: Path, broker: Mosquitto) -> AsyncIterator[app.House]:
    settings = Settings.model_validate(
        {
            "home": folder / "home",
            "http": {"port": 0},
            "mqtt": broker.settings(burst=10**9, state_seconds=3600),
            "learning": {"enabled": False},
            "log": {"level": "error"},
        }
    )
    logs.configure(settings.log)
    async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()) as house:
        await house.services.users.add("ann")
        while house.mqtt is None or not house.mqtt.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        yield house


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=3000)
    parser.add_argument("--plain", action="store_true", help="the broker persists nothing")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
