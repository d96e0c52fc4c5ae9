"""Every option of persona: defaults, then the TOML file, then PERSONA_SECTION__KEY in the environment.

A key that does not exist stops the start and names its nearest neighbour. Settings are read once and never change.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona.errors import ConfigurationError


class Section(BaseModel):
    """A table of the TOML file: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Http(Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8377, ge=0, le=65535, description="TCP port; 0 picks a free one")
    max_body: int = Field(2 << 20, ge=1024, description="largest request body in bytes")
    body_seconds: float = Field(30.0, gt=0, description="deadline for reading a request body, in seconds")
    keepalive_seconds: float = Field(75.0, gt=0, description="idle time after which a connection is closed")
    ping_seconds: float = Field(15.0, gt=0, description="silence after which a stream sends a comment")
    write_seconds: float = Field(30.0, gt=0, description="time a client may take to read what was written to it")
    connections: int = Field(
        512,
        ge=1,
        description="open connections; one more is answered 503, and so is an address elsewhere with a quarter of them",
    )
    shutdown_seconds: float = Field(5.0, ge=0, description="time running replies get to end when the service stops")
    failures_per_minute: int = Field(20, ge=1, description="401 answers an address may cause a minute before 429")


class Model(Section):
    name: str = Field("smollm2-135m-instruct", description="the embedded model, a Hugging Face id or a local folder")
    weights: Literal["auto", "int4", "nf4", "none"] = Field(
        "auto", description="4-bit form of the base; auto: int4 on the CPU, nf4 on CUDA"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the base lives")


class Engine(Section):
    context: int = Field(4096, ge=256, description="tokens one sequence may have, prompt and reply together")
    max_running: int = Field(32, ge=1, le=1024, description="sequences decoded in one step")
    max_waiting: int = Field(
        256, ge=1, description="requests that may wait; above, the user with the most is answered 503"
    )
    page_tokens: int = Field(32, ge=16, le=256, multiple_of=16, description="tokens per page of memory")
    memory_mb: int = Field(1024, ge=64, description="memory for context and adapters together, in MiB")
    host_mb: int = Field(256, ge=1, description="budget for adapters kept in RAM as they are stored, in MiB")
    prefill_tokens: int = Field(256, ge=16, description="prompt tokens computed in one step")
    patience_seconds: float = Field(
        60.0,
        gt=0,
        description="time within which a request must get its turn, else it is answered 503: how late a first token may"
        " be",
    )
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: all cores")
    native: bool = Field(
        True,
        description="on the CPU, compile the engine's step for this machine if there is a C compiler: thrice as fast",
    )
    hang_seconds: float = Field(10.0, gt=0, description="silence after which the engine is restarted")
    start_seconds: float = Field(300.0, gt=0, description="longest time loading the model may take")


class Mqtt(Section):
    enabled: bool = Field(False, description="take in events and answer chats over MQTT")
    embedded: bool = Field(False, description="run a broker of our own on the loopback: for demos only")
    host: str = Field("127.0.0.1", description="address of the broker")
    port: int = Field(1883, ge=0, le=65535, description="its TCP port; 0, for the embedded broker: a free one")
    username: str = Field("", description="name at the broker; empty: none")
    password_file: str = Field(
        "", description="file that holds the password; empty: the credential mqtt-password of systemd, or none"
    )
    tls: bool = Field(False, description="encrypt the connection; port is usually 8883 then")
    ca_file: str = Field("", description="certificates that the broker's is checked by; empty: the system's")
    cert_file: str = Field("", description="certificate with which persona shows who it is")
    key_file: str = Field("", description="key of cert_file")
    version: Literal["5", "3.1.1"] = Field("5", description="version of the protocol")
    prefix: str = Field("persona", description="first part of every topic")
    discovery: bool = Field(True, description="announce users and the service to Home Assistant")
    discovery_prefix: str = Field("homeassistant", description="first part of Home Assistant's discovery topics")
    window: int = Field(500, ge=1, le=5000, description="messages that the broker may send before we acknowledge")
    qos0_waiting: int = Field(
        10_000, ge=1, description="waiting messages of QoS 0 above which more of them are counted and dropped"
    )
    max_payload: int = Field(65_536, ge=256, description="largest payload in bytes; the broker has a limit of its own")
    events_per_second: float = Field(100.0, gt=0, description="events that a user may send in the long run")
    burst: int = Field(
        100_500, ge=1, description="events that a user may send at once: what the broker may hold after an outage"
    )
    kept_payloads: int = Field(100, ge=0, description="payloads of dead letters kept per user, reason and minute")
    keep_days: float = Field(30.0, gt=0, description="days after which dead letters and receipts of events are removed")
    keepalive_seconds: int = Field(30, ge=5, le=3600, description="silence after which the broker is asked for a sign")
    state_seconds: float = Field(30.0, gt=0, description="how often changed states are published")


class Prompt(Section):
    system: str = Field(
        "You are a helpful assistant who knows the user well.", description="system text of the persona model"
    )
    recent_tokens: int = Field(512, ge=0, description="budget for history that the adapter has not absorbed")
    retrieved_tokens: int = Field(256, ge=0, description="budget for entries found by search")
    facts_tokens: int = Field(128, ge=0, description="budget for what is known of the user")
    states_tokens: int = Field(128, ge=0, description="budget for the states of the user's devices")
    retrieved_entries: int = Field(4, ge=0, description="entries found by search, at most")
    max_reply_tokens: int = Field(1024, ge=1, description="upper bound of max_tokens")


class Learning(Section):
    enabled: bool = Field(True, description="train at all")
    check_seconds: float = Field(60.0, gt=0, description="how often the scheduler looks for users who are due")
    min_new_tokens: int = Field(1500, ge=1, description="new own tokens that make a user due")
    max_age_hours: float = Field(24.0, gt=0, description="time after which fewer tokens make a user due")
    min_aged_tokens: int = Field(500, ge=1, description="new own tokens that make a user due after max_age_hours")
    held_out_messages: int = Field(20, ge=2, description="newest messages that no version has seen, at least")
    held_out_tokens: int = Field(500, ge=1, description="own tokens in the held-out messages, at least")
    replay_tokens: int = Field(0, ge=0, description="own tokens of absorbed history, ratings aside, trained again")
    max_run_tokens: int = Field(60000, ge=1000, description="tokens, context included, that one run may train on")
    context_tokens: int = Field(96, ge=0, description="masked context before each target")
    quoted_tokens: int = Field(
        96, ge=0, description="recent history quoted before every second target, as serving quotes it"
    )
    rank: int = Field(2, ge=1, le=64, description="rank of the adapter")
    alpha: float = Field(4.0, gt=0, description="LoRA alpha")
    layers: float = Field(0.9, gt=0, le=1, description="share of the layers, from the top, that an adapter changes")
    passes: int = Field(1, ge=1, description="times the examples are seen in one run")
    learning_rate: float = Field(
        3e-3, gt=0, description="peak learning rate; messages of more than 32 words on average have a slower one"
    )
    warm_rate: float = Field(
        1e-3,
        gt=0,
        description="the same of a run that starts from the user's version or the prior, which a larger one would undo",
    )
    prior: str = Field("", description="folder of an adapter from which users start (persona prior train); empty: none")
    batch_tokens: int = Field(160, ge=16, description="own tokens per optimizer step, at most")
    least_steps: int = Field(
        64,
        ge=0,
        description="optimizer steps that a run has: where there is little to learn, each has fewer own tokens",
    )
    slice_tokens: int = Field(256, ge=16, description="tokens per training slice: bounds the gap in serving")
    keep_probability: float = Field(0.8, ge=0.5, le=1, description="P(better) at which the gate keeps a version")
    rehearsal: float = Field(
        1.0, ge=0, description="tokens of the base's own replies rehearsed for each own token, so that it still answers"
    )
    max_drift: float = Field(0.01, ge=0, description="relative loss increase on the reference set that the gate allows")
    max_forgetting: float = Field(
        0.1, ge=0, description="nats per token by which the base's own replies may become less likely"
    )
    live_check: bool = Field(
        True, description="judge the serving version by each new message, and roll it back once it is surely worse"
    )
    keep_versions: int = Field(5, ge=1, description="published versions kept for rollback")


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line that is shown")
    json_lines: bool = Field(False, description="JSON lines in place of readable ones")


class Settings(Section):
    """The whole configuration."""

    home: Path = Field(default_factory=lambda: default_home(), description="folder of all state")
    http: Http = Http()
    model: Model = Model()
    engine: Engine = Engine()
    mqtt: Mqtt = Mqtt()
    prompt: Prompt = Prompt()
    learning: Learning = Learning()
    log: Log = Log()

    @property
    def database(self) -> Path:
        return self.home / "persona.db"

    @property
    def adapters(self) -> Path:
        return self.home / "adapters"

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def admin_socket(self) -> Path:
        return self.run_dir / "admin.sock"

    @property
    def mqtt_client(self) -> Path:
        """Holds the name under which the broker keeps our session."""
        return self.home / "mqtt-client"

    @property
    def engine_socket(self) -> Path:
        return self.run_dir / "engine.sock"

    @property
    def cache(self) -> Path:
        """Prepared models: may be deleted, costs only time. PERSONA_CACHE overrides."""
        return Path(os.environ.get("PERSONA_CACHE") or default_cache())


def default_home() -> Path:
    """PERSONA_HOME, systemd's StateDirectory, or the XDG data folder."""
    if home := os.environ.get("PERSONA_HOME"):
        return Path(home)
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0])
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "persona"


def default_cache() -> Path:
    """systemd's CacheDirectory, or the XDG cache folder."""
    if cache := os.environ.get("CACHE_DIRECTORY"):
        return Path(cache.split(":")[0])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona"


# Environment variables with the prefix that are not settings.
_NOT_SETTINGS = {"PERSONA_HOME", "PERSONA_CACHE", "PERSONA_CONFIG", "PERSONA_KEY", "PERSONA_FAILPOINT"}


def load(file: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `file` (or $PERSONA_CONFIG) and the environment. Raises ConfigurationError in one sentence."""
    path = file or (Path(environ["PERSONA_CONFIG"]) if environ.get("PERSONA_CONFIG") else None)
    values = _read(path) if path else {}
    for key, value in _overrides(environ):
        _put(values, key, value)
    if home := environ.get("PERSONA_HOME"):
        values["home"] = home
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None
    return settings.model_copy(update={"home": settings.home.expanduser().absolute()})


def options() -> Iterator[tuple[str, Any, str]]:
    """Every option as (dotted name, default, description)."""
    for name, info in Settings.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for key, sub in kind.model_fields.items():
                yield f"{name}.{key}", sub.default, sub.description or ""
        else:
            yield name, info.default, info.description or ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"The configuration file {path} does not exist; check --config.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"The configuration file {path} cannot be read: {error}.") from None


def _overrides(environ: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    for name, value in environ.items():
        if name.startswith("PERSONA_") and name not in _NOT_SETTINGS:
            yield name.removeprefix("PERSONA_").lower().split("__"), value


def _put(values: dict[str, Any], key: list[str], value: str) -> None:
    table: Any = values
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"The setting {part} is a section: it takes keys, not a value.")
    table[key[-1]] = value


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"The setting {name} is wrong: {first['msg']}."
    known = [option for option, _, _ in options()]
    near = [option for option in known if option.endswith(f".{name}")]  # without its section
    near = near or difflib.get_close_matches(name, known + sorted({k.split(".")[0] for k in known}), n=1, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; configs/persona.toml lists every setting."
    return f"There is no setting {name}{hint}"
