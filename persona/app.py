"""The composition root of the service: builds every part in order, serves, and takes all down in reverse.

Lock → database → repair → engine → one token → schedule → sites → READY. Nothing is answered before everything behind
it works, and at the end the sites close first: running replies end properly, then training stops, then the engine,
then the database.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from aiohttp import web

from jobs import plans, retention
from jobs.finetune import Finetune
from jobs.live import LiveCheck
from jobs.schedule import Schedule
from persona import app_mqtt, logs, notify
from persona.api import connections
from persona.api.archive import PREFIX as EXPORT_PREFIX
from persona.api.connections import BoundedSite
from persona.api.metrics import Metrics
from persona.api.routes import admin_application, public_application
from persona.api.services import Services
from persona.app_home import alone, mend
from persona.app_stop import Stop
from persona.app_watch import watching
from persona.chat import Chat
from persona.domain import ChatTokenizer, Message, Role
from persona.engine import device, prepare
from persona.engine.client import LocalEngine
from persona.engine.faces import Engine
from persona.engine.prepare import Prepared
from persona.engine.protocol import GenerateRequest, Sampling
from persona.engine.text import Text
from persona.errors import Busy, ConfigurationError, ModelError, StorageFull
from persona.events import Intake
from persona.ingest.broker import Account
from persona.ingest.mqtt import Mqtt
from persona.pulse import Pulse
from persona.settings import Settings
from storage.adapters import Adapters
from storage.backup import Backups
from storage.database import Database
from storage.events import Events
from storage.history import History
from storage.live import LiveChecks
from storage.runs import Runs
from storage.users import Users

log = structlog.get_logger()

Clock = Callable[[], datetime]
_LINGER = 2.0  # seconds in which what a refused client still sends is read and thrown away
_SETTLE = 10.0  # seconds that a cancelled task may take to end
_SOCKET_PATH_BYTES = 107  # what a Unix socket's address can hold


@dataclass(frozen=True, slots=True)
class House:
    """The running service: its parts, and the address under which it answers."""

    services: Services
    url: str
    mqtt: Mqtt | None = None
    broker: Account | None = None  # the embedded one


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine, its tokenizer, and where its base lies."""

    engine: Engine
    tokenizer: ChatTokenizer
    prepared: Prepared | None


Ready = Callable[[House], Awaitable[None]]
Tell = Callable[[str], None]  # what the start has come to


def _quiet(stage: str) -> None:
    """Nobody listens."""


def utcnow() -> datetime:
    return datetime.now(UTC)


async def serve(
    settings: Settings,
    *,
    ready: Ready | None = None,
    engine: Engine | None = None,
    tokenizer: ChatTokenizer | None = None,
) -> None:
    """Run until SIGTERM or SIGINT. `ready` is called once everything works. Raises ConfigurationError if it cannot."""
    logs.configure(settings.log)
    asyncio.get_running_loop().set_exception_handler(logs.loop_error)
    stop = Stop()
    with stop.ends_the_start():
        async with watching(notify.Supervisor.of(os.environ)) as watch:
            listening = notify.inherited(os.environ)
            parts = build(settings, engine=engine, tokenizer=tokenizer, listening=listening, tell=watch.loading)
            async with parts as house:
                stop.started()
                log.info("→ serving", url=house.url, model=settings.model.name, home=str(settings.home))
                if ready is not None:
                    await ready(house)
                watch.ready(house.services.pulse, house.url)
                await stop.asked.wait()
                log.info("stopping: no new requests")
                watch.stopping()
    log.info("← stopped")


@asynccontextmanager
async def build(
    settings: Settings,
    *,
    engine: Engine | None = None,
    tokenizer: ChatTokenizer | None = None,
    prepared: Prepared | None = None,
    clock: Clock = utcnow,
    listening: socket.socket | None = None,
    tell: Tell = _quiet,
) -> AsyncIterator[House]:
    """The whole service, listening. An engine that is given comes with its tokenizer; None: the engine process.

    `listening` is a socket that already does, in place of one of its own; who connects early waits there.
    """
    async with AsyncExitStack() as stack:
        if listening is not None:
            stack.callback(listening.close)
        stack.enter_context(alone(settings))
        if listening is None:
            await connections.check(settings.http)  # a taken port is told before minutes of loading
        tell("opening the database")
        mended = mend(settings, EXPORT_PREFIX)
        database = await Database.open(settings.database)
        stack.push_async_callback(database.close)
        stack.push_async_callback(_settled)
        for sentence in mended + await _repair(settings, database):
            log.warning("repaired", what=sentence)
        if engine is not None and tokenizer is not None:
            serving = Serving(engine, tokenizer, prepared)
        else:
            serving = await stack.enter_async_context(_engine_process(settings, tell))
        services, schedule = await _services(settings, database, serving, clock)
        await stack.enter_async_context(_looking(services.pulse))
        stack.push_async_callback(schedule.stop)
        await schedule.start()
        site = await _listen(stack, services, listening)
        mqtt, account = None, None
        if settings.mqtt.enabled:
            mqtt, account = await stack.enter_async_context(app_mqtt.running(services))
        yield House(services, site.name, mqtt, account)


async def _settled() -> None:
    """Requests and checks that were cancelled let go of the database before it closes."""
    leaving = [task for task in asyncio.all_tasks() if task.cancelling() and task is not asyncio.current_task()]
    if leaving:
        await asyncio.wait(leaving, timeout=_SETTLE)


async def _repair(settings: Settings, database: Database) -> list[str]:
    """What a hard stop may have left: folders without rows, rows without folders, candidates that nobody judged,
    copies that hold who was forgotten."""
    adapters = Adapters(database, settings.adapters)
    parts = (adapters, Backups(database, adapters), Users(database))
    return [sentence for part in parts for sentence in await _repaired(part.repair)]


async def _repaired(repair: Callable[[], Awaitable[list[str]]]) -> list[str]:
    """A full disk or a lock must not keep the service down: what it forbids now is repaired at the next start."""
    try:
        return await repair()
    except (StorageFull, Busy) as error:
        log.warning("repairs wait for the next start", error=type(error).__name__)
        return []


@asynccontextmanager
async def _engine_process(settings: Settings, tell: Tell) -> AsyncIterator[Serving]:
    """The engine, loaded, and proved to generate."""
    name = settings.model.name
    weights = device.choose(settings.model).weights
    prepared = await asyncio.to_thread(prepare.ready, name, settings.cache, weights)
    if prepared is None:
        raise ModelError(f"The model {name} is not prepared: run `persona model fetch` once.")
    tokenizer = await asyncio.to_thread(Text.load, prepared.folder)
    engine = LocalEngine(settings, prepared)
    try:
        tell(f"loading {name}")
        await engine.start()
        tell("generating a first token")
        await _warm_up(engine, tokenizer)
        yield Serving(engine, tokenizer, prepared)
    finally:
        await engine.stop()


async def _warm_up(engine: Engine, tokenizer: ChatTokenizer) -> None:
    """One token of the bare base: what a first request would wait for is done, and known to work."""
    rendered = tokenizer.render([Message(Role.USER, "Hello.")], reply=True)
    async for chunk in engine.generate(GenerateRequest(rendered.tokens, Sampling(max_tokens=1))):
        if chunk.error is not None:
            raise ModelError("The engine loads the model but cannot generate with it; its last lines say why.")


@asynccontextmanager
async def _looking(pulse: Pulse) -> AsyncIterator[None]:
    """Keep an eye on the engine."""
    task = asyncio.create_task(pulse.go_on(), name="pulse")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _services(
    settings: Settings, database: Database, serving: Serving, clock: Clock
) -> tuple[Services, Schedule]:
    engine, tokenizer = serving.engine, serving.tokenizer
    health = await engine.health()  # base and context stay as they are while the service runs
    context = min(settings.engine.context, health.context)
    users, history, runs, events = Users(database), History(database), Runs(database), Events(database, clock)
    adapters = Adapters(database, settings.adapters)

    def base() -> str:
        return health.base

    plans.check_prior(settings.learning, health.base)
    finetune = Finetune(settings, users, history, adapters, runs, engine, tokenizer, base, clock)
    live = LiveCheck(settings, users, history, adapters, LiveChecks(database), engine, tokenizer, base, clock)
    keep = timedelta(days=settings.mqtt.keep_days)
    schedule = Schedule(
        settings, users, history, adapters, runs, finetune, clock, lambda: retention.tidy(events, clock(), keep), live
    )
    intake = Intake(settings.mqtt, users, events, tokenizer, clock)
    database.on_removed(intake.removed)
    metrics = Metrics()
    metrics.events.read, metrics.dead_letters.read = intake.outcomes, intake.reasons
    metrics.live.read = lambda: live.counts
    chat = Chat(settings, history, events, adapters, engine, tokenizer, clock, lambda: context, base)
    finetune.warm = chat.warm
    database.on_removed(chat.removed)
    services = Services(
        settings=settings,
        database=database,
        users=users,
        history=history,
        adapters=adapters,
        runs=runs,
        events=events,
        intake=intake,
        backups=Backups(database, adapters, clock),
        engine=engine,
        tokenizer=tokenizer,
        chat=chat,
        finetune=finetune,
        live=live,
        schedule=schedule,
        clock=clock,
        base=base,
        metrics=metrics,
        prepared=serving.prepared,
        pulse=Pulse(engine, settings.engine),
    )
    return services, schedule


async def _listen(stack: AsyncExitStack, services: Services, listening: socket.socket | None) -> BoundedSite:
    """Open the admin socket, then the TCP address. At the end running replies are drained before anything closes."""
    http = services.settings.http
    stack.callback(services.settings.admin_socket.unlink, missing_ok=True)  # one that is left tells of a kill
    await _open_admin_socket(await _runner(stack, services, admin_application(services)), services.settings)
    public = public_application(services)

    async def drain(application: web.Application) -> None:
        await services.chat.drain(http.shutdown_seconds)

    public.on_shutdown.append(drain)
    site = BoundedSite(await _runner(stack, services, public), http, listening)
    await site.start()
    return site


async def _runner(stack: AsyncExitStack, services: Services, application: web.Application) -> web.AppRunner:
    http = services.settings.http
    runner = web.AppRunner(
        application,
        access_log=None,
        handler_cancellation=True,  # a client that leaves must not keep the engine busy
        keepalive_timeout=http.keepalive_seconds,
        lingering_time=_LINGER,
        auto_decompress=False,
        shutdown_timeout=max(1.0, http.shutdown_seconds),
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner


async def _open_admin_socket(runner: web.AppRunner, settings: Settings) -> None:
    path = settings.admin_socket
    if len(str(path).encode()) > _SOCKET_PATH_BYTES:
        raise ConfigurationError(f"The path {path} is too long for a socket; choose a shorter PERSONA_HOME.")
    await web.UnixSite(runner, str(path)).start()
    path.chmod(0o600)
