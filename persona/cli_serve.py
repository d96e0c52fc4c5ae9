"""`persona serve` and `persona model`: prepare the base model, then run the service until a signal ends it.

The demo adds a first user and prints lines that work as they stand; the key in them is shown at the first start only.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from persona.cli_screen import Json, emit, progress, say, settings
from persona.engine import device, prepare
from persona.errors import ModelError
from persona.notify import Supervisor
from persona.settings import Settings, load
from storage.users import Users

if TYPE_CHECKING:
    from persona.app import House

DEMO_USER = "you"
_FETCHING = 3_600_000_000  # microseconds that a service manager is asked for: a model may have to be fetched
_DEMO = """
persona answers at {url}/v1 and learns from its user «{user}». Key: {told}

curl {url}/v1/chat/completions -H "Authorization: Bearer {shell}" -H "Content-Type: application/json" \\
  -d '{{"model": "persona", "messages": [{{"role": "user", "content": "Hello, who are you?"}}]}}'

.venv/bin/python -c '
{imports}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={python})
messages = [{{"role": "user", "content": "Hello, who are you?"}}]
print(client.chat.completions.create(model="persona", messages=messages).choices[0].message.content)'

{broker}Ctrl-C stops it. To talk from another terminal: .venv/bin/persona chat --user {user}
"""

_BROKER = """\
There is an MQTT broker inside, for trying out: port {port} on this machine alone, user persona, password {password}.
It forgets everything when it ends; for events that matter run Mosquitto (docs/DEPLOY.md).

mosquitto_pub -p {port} -u persona -P {password} -q 1 \\
  -t persona/u/{user}/events/fact -m '{{"key": "diet", "value": "vegan"}}'

"""


@dataclass(frozen=True, slots=True)
class _Key:
    """How the demo speaks of a key: in a sentence, in a shell, in Python."""

    told: str
    shell: str
    python: str
    imports: str = ""


model = typer.Typer(help="The base model.", no_args_is_help=True)


def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Make a first user and show how to ask.")] = False,
) -> None:
    """Run the service until Ctrl-C or SIGTERM."""
    configuration = load(config) if config else settings(context)
    Supervisor.of(os.environ).tell(STATUS="Starting: looking for the model", EXTEND_TIMEOUT_USEC=_FETCHING)
    fetched(configuration)
    from persona import app  # takes a second that no other command needs

    async def ready(house: "House") -> None:
        if demo:
            say(await welcome(house))

    asyncio.run(app.serve(configuration, ready=ready))


async def welcome(house: "House") -> str:
    """How to ask, as lines that work when they are pasted."""
    key = await _demo_key(house.services.users)
    return _DEMO.format(url=house.url, user=DEMO_USER, broker=_broker(house), **asdict(key))


def _broker(house: "House") -> str:
    """How to reach the broker inside, if there is one."""
    if house.broker is None:
        return ""
    port, password = house.broker.port, house.broker.password
    return _BROKER.format(port=port, password=password, user=DEMO_USER)


async def _demo_key(users: Users) -> _Key:
    """A new key if the demo's user has just been made; a key that was shown once is gone from here."""
    if await users.get(DEMO_USER) is not None:
        told = f"as shown at the first start, in PERSONA_KEY; .venv/bin/persona keys add {DEMO_USER} makes another."
        return _Key(told, "$PERSONA_KEY", 'os.environ["PERSONA_KEY"]', "import os\n")
    user = await users.add(DEMO_USER)
    _, secret = await users.add_key(user.id, label="demo")
    return _Key(f"{secret} (it is not shown again)", secret, f'"{secret}"')


@model.command("fetch")
def fetch(context: typer.Context, json: Json = False) -> None:
    """Fetch, check and convert the model that model.name names."""
    _tell(fetched(settings(context)), json)


@model.command("show")
def show(context: typer.Context, json: Json = False) -> None:
    """Show the prepared model."""
    configuration = settings(context)
    form = device.choose(configuration.model).weights
    found = prepare.ready(configuration.model.name, configuration.cache, form)
    if found is None:
        raise ModelError(f"{configuration.model.name} is not prepared yet: `persona model fetch` does it.")
    _tell(found, json)


def fetched(configuration: Settings) -> prepare.Prepared:
    """The prepared model; the first time, after a download and a conversion with a progress bar."""
    name, form = configuration.model.name, device.choose(configuration.model).weights
    if found := prepare.ready(name, configuration.cache, form):
        return found
    with _bar() as notify:
        return prepare.fetch(name, configuration.cache, form, notify)


@contextmanager
def _bar() -> Iterator[prepare.Notify]:
    """One bar for each thing that is being done; without a terminal, one line."""
    tasks: dict[str, TaskID] = {}
    with progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()) as bar:

        def notify(doing: str, share: float) -> None:
            if doing not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[doing] = bar.add_task(doing, total=1.0)
                if bar.disable:
                    typer.echo(f"{doing} …", err=True)
            bar.update(tasks[doing], completed=share)

        yield notify


def _tell(found: prepare.Prepared, json: bool) -> None:
    if json:
        emit({"name": found.name, "weights": found.weights, "base": found.base, "folder": str(found.folder)})
    else:
        say(f"{found.name} is ready as {found.weights} in {found.folder}, base {found.base[:12]}.")
