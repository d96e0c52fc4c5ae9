"""How the service's MQTT part is put together, taken up after everything it serves and taken down before it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import structlog

from persona.api.services import Services
from persona.errors import PersonaError
from persona.ingest import broker, connection
from persona.ingest.broker import Account
from persona.ingest.mqtt import Mqtt
from persona.ingest.presence import House, Presence
from persona.ingest.talk import Talk
from persona.ingest.topics import Topics
from persona.settings import Settings

log = structlog.get_logger()


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[tuple[Mqtt, Account | None]]:
    """MQTT for as long as the block lasts, with the embedded broker if the settings want one."""
    settings, account = services.settings, None
    async with AsyncExitStack() as stack:
        password = connection.password(settings.mqtt, os.environ.get("CREDENTIALS_DIRECTORY"))
        if settings.mqtt.embedded:
            account = await stack.enter_async_context(broker.embedded(settings.mqtt))
            settings = settings.model_copy(update={"mqtt": broker.reached(settings.mqtt, account)})
            password = account.password
        mqtt = _mqtt(services, settings, password)
        services.metrics.mqtt_up.set_function(lambda: float(mqtt.connected))
        services.metrics.mqtt.read = lambda: mqtt.counts
        services.checks.append(lambda: ("broker", mqtt.trouble()))
        await mqtt.start()
        try:
            yield mqtt, account
        finally:
            # No surface takes anything new, and all replies have the same time to end.
            await asyncio.gather(mqtt.stop(), services.chat.drain(settings.http.shutdown_seconds))


def _mqtt(services: Services, settings: Settings, password: str | None) -> Mqtt:
    topics = Topics(settings.mqtt)
    talk = Talk(settings, services.users, services.chat, topics, services.base, services.clock, services.metrics.reply)
    house = House(settings.model.name, services.base, lambda: _troubles(services, mqtt))
    stored = (services.database, services.events)
    presence = Presence(settings.mqtt, topics, *stored, services.intake, house, services.clock)

    async def train(name: str) -> None:
        await _train(services, name)

    mqtt = Mqtt(settings, topics, services.intake, talk, presence, train, password=password, random=Random())
    return mqtt


def _troubles(services: Services, mqtt: Mqtt) -> list[str]:
    """What is wrong with the service as a whole, as far as it can be told in no time."""
    full = "The disk is full: replies go unrecorded until there is space." if services.chat.disk_full else None
    return [trouble for trouble in (services.pulse.trouble(), full, mqtt.held) if trouble]


async def _train(services: Services, name: str) -> None:
    """A wish from a button: there is nobody to answer, so a refusal is a line in the log."""
    try:
        user = await services.users.get(name)
        if user is None or not user.learn or user.paused or not services.settings.learning.enabled:
            log.warning("no training on request", user=name if user else None)
            return
        await services.runs.request(user.id, services.clock())
        services.schedule.wake()
    except PersonaError as error:
        log.warning("no training on request", kind=type(error).__name__)
