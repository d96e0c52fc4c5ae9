"""The whole service in a home that is gone afterwards, with users whose adapters hold random values: to be measured.

Users, keys and versions are made by the product's own storage, so they are ordinary ones. Nobody learns: a prompt holds
what was asked and nothing else.
"""

import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from jobs import plans
from persona import app, logs
from persona.app_private import require_memory
from persona.domain import EntryId, UserId, Version
from persona.engine import adapter_file, random_adapter
from persona.engine.prepare import Prepared
from persona.engine.protocol import Plan, replace
from persona.engine.shape import Shape
from persona.errors import ConfigurationError
from persona.settings import Log, Settings

_SPARE = 256 << 20  # bytes of disk that stay free
_PER_USER = 16 << 10  # bytes of a user in the database and on the disk, weights aside

Notify = Callable[[int], None]  # users that are done


@asynccontextmanager
async def private_service(settings: Settings, prepared: Prepared) -> AsyncIterator[app.House]:
    """A service on a free port of this machine's loopback. Raises ConfigurationError if memory is short."""
    logs.configure(Log(level="warning"), sys.stderr)  # stdout is for what was measured
    require_memory(prepared, settings.engine.memory_mb)
    with tempfile.TemporaryDirectory(prefix="persona-") as home:
        async with app.build(_adapted(settings, Path(home))) as house:
            yield house


async def populate(
    house: app.House, users: int, ranks: Sequence[int], notify: Notify
) -> tuple[list[str], list[Version]]:
    """Register users, the i-th with an adapter of rank `ranks[i % len(ranks)]`; none without ranks.

    Returns a key and, with ranks, the serving version of each. Raises ConfigurationError if the disk is too small.
    """
    plan = plans.plan(house.services.settings.learning, 1)
    chosen = [replace(plan, rank=rank) for rank in ranks]
    _require_space(house, users, chosen)
    keys, versions = [], []
    for number in range(users):
        user = await house.services.users.add(f"bench-{number:05d}", learn=False)
        keys.append((await house.services.users.add_key(user.id, label="bench"))[1])
        if chosen:
            versions.append(await _publish(house, user.id, chosen[number % len(chosen)], number))
        notify(number + 1)
    return keys, versions


def corrupt(version: Version) -> None:
    """Flip bits in the middle of a version's weights, as a failing disk would."""
    file = Path(version.path) / adapter_file.FILE
    file.chmod(0o600)
    with file.open("r+b") as stream:
        stream.seek(version.bytes // 2)
        byte = stream.read(1)[0]
        stream.seek(version.bytes // 2)
        stream.write(bytes([byte ^ 0xFF]))
    file.chmod(0o400)


async def _publish(house: app.House, user_id: UserId, plan: Plan, seed: int) -> Version:
    """A published version that serves; the engine loads it when it is first asked for."""
    adapters, shape, base = house.services.adapters, _shape(house), house.services.base()
    folder = await adapters.workspace(user_id)
    await asyncio.to_thread(random_adapter.write, folder, shape, base, plan, seed)
    about = {"rank": plan.rank, "alpha": plan.alpha, "layers": plan.layers, "random": True}
    version = await adapters.publish(
        user_id,
        folder,
        watermark=EntryId(0),
        parent=None,
        base=base,
        run_id=None,
        metrics={},
        plan=about,
    )
    await adapters.point(user_id, version.number)
    return version


def _shape(house: app.House) -> Shape:
    prepared = house.services.prepared
    assert prepared is not None  # app.build prepared it
    return Shape.read(prepared.folder)


def _require_space(house: app.House, users: int, chosen: Sequence[Plan]) -> None:
    shape = _shape(house)
    mean = sum(random_adapter.nbytes(shape, plan) for plan in chosen) // max(1, len(chosen))
    wanted = users * (mean + _PER_USER) + _SPARE
    home = house.services.settings.home
    if (free := shutil.disk_usage(home).free) < wanted:
        raise ConfigurationError(
            f"{users} users with adapters take {wanted >> 20} MiB in {home.parent}, and {free >> 20} MiB are free:"
            " measure with fewer users or lower ranks, or name a larger folder with TMPDIR."
        )


def _adapted(settings: Settings, home: Path) -> Settings:
    """As configured, but private: a free port of the loopback, no broker, no training."""
    changes = {
        "http": settings.http.model_copy(update={"host": "127.0.0.1", "port": 0}),
        "mqtt": settings.mqtt.model_copy(update={"enabled": False}),
        "learning": settings.learning.model_copy(update={"enabled": False}),
    }
    return settings.model_copy(update={**changes, "home": home})
