"""Settings: who wins, what is refused and in which words, and that the shipped files are true."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from persona.errors import ConfigurationError
from persona.settings import Settings, load, options

CONFIGS = Path(__file__).parent.parent / "configs"


def written(folder: Path, text: str) -> Path:
    file = folder / "persona.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_without_file_and_environment_the_defaults_hold() -> None:
    assert load(environ={}).model_dump(exclude={"home"}) == Settings().model_dump(exclude={"home"})


def test_the_file_beats_the_default_and_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "[http]\nport = 9001\nmax_body = 4096\n")
    settings = load(file, {"PERSONA_HTTP__PORT": "9002", "PATH": "/bin"})
    assert (settings.http.port, settings.http.max_body, settings.http.host) == (9002, 4096, "127.0.0.1")


def test_the_environment_names_the_file_unless_the_caller_does(tmp_path: Path) -> None:
    named = written(tmp_path, "[http]\nport = 9001\n")
    other = tmp_path / "other.toml"
    other.write_text("[http]\nport = 9003\n", encoding="utf-8")
    assert load(environ={"PERSONA_CONFIG": str(named)}).http.port == 9001
    assert load(other, {"PERSONA_CONFIG": str(named)}).http.port == 9003


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("false", False), ("0", False), ("true", True), ("1", True)],
)
def test_a_switch_can_be_set_from_the_environment(value: str, meaning: bool) -> None:
    assert load(environ={"PERSONA_LEARNING__ENABLED": value}).learning.enabled is meaning


@pytest.mark.parametrize("port", ["0", "65535"])
def test_a_port_may_lie_on_either_edge(port: str) -> None:
    assert load(environ={"PERSONA_HTTP__PORT": port}).http.port == int(port)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"PERSONA_HTTP__PROT": "1"}, "did you mean http.port?"),
        ({"PERSONA_LEARNING__LEARNINGRATE": "1"}, "did you mean learning.learning_rate?"),
        ({"PERSONA_HTPP__PORT": "1"}, "did you mean http"),
        ({"PERSONA_PORT": "1"}, "did you mean http.port or mqtt.port?"),
        ({"PERSONA_QQ__ZZ": "1"}, "configs/persona.toml lists every setting"),
    ],
)
def test_a_misspelt_variable_stops_the_start_and_names_its_neighbour(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ)
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[http]\nhots = 'a'\n", "http.hots; did you mean http.host?"),
        ("[learnign]\nenabled = true\n", "learnign; did you mean learning"),
        ("hom = '/x'\n", "hom; did you mean home?"),
    ],
)
def test_a_misspelt_key_in_the_file_stops_the_start_and_names_its_neighbour(
    tmp_path: Path, text: str, named: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(written(tmp_path, text), {})
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"PERSONA_HTTP__PORT": "eighty"}, "http.port"),
        ({"PERSONA_HTTP__PORT": "65536"}, "http.port"),
        ({"PERSONA_HTTP__PORT": "-1"}, "http.port"),
        ({"PERSONA_MODEL__WEIGHTS": "int3"}, "model.weights"),
        ({"PERSONA_LEARNING__LAYERS": "0"}, "learning.layers"),
        ({"PERSONA_LEARNING__ENABLED": "perhaps"}, "learning.enabled"),
        ({"PERSONA_HTTP": "x"}, "http"),
        ({"PERSONA_HTTP__PORT__DEEP": "x"}, "http.port"),
        ({"PERSONA_HTTP": "x", "PERSONA_HTTP__PORT": "1"}, "http"),
    ],
)
def test_a_wrong_value_is_named_in_one_sentence(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ)
    assert named in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", [b"[http\nport = 1", b"port = \xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "persona.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=re.escape(str(file))):
        load(file, {})


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load(tmp_path / "none.toml", {})


def test_all_state_lies_under_persona_home(tmp_path: Path) -> None:
    file = written(tmp_path, "home = '/elsewhere'\n")
    settings = load(file, {"PERSONA_HOME": str(tmp_path / "state")})
    places = (settings.database, settings.adapters, settings.run_dir, settings.admin_socket, settings.engine_socket)
    assert all(place.is_relative_to(tmp_path / "state") for place in places)


def test_home_is_the_xdg_folder_or_that_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERSONA_HOME", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load(environ={}).home == tmp_path / "persona"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/persona:/var/lib/other")
    assert load(environ={}).home == Path("/var/lib/persona")


def test_the_cache_is_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    assert load(environ={}).cache == tmp_path / "cache"


def test_home_is_absolute_and_the_tilde_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(environ={"PERSONA_HOME": "~/state"}).home == tmp_path / "state"
    monkeypatch.chdir(tmp_path)
    assert load(environ={"PERSONA_HOME": "state"}).home == tmp_path / "state"


def test_settings_never_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().http.port = 1


def flat(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, table in values.items()
        for key, value in (table.items() if isinstance(table, dict) else ())
    }


def test_persona_toml_holds_every_option_at_its_default_with_its_description() -> None:
    text = (CONFIGS / "persona.toml").read_text(encoding="utf-8")
    expected = {name: default for name, default, _ in options() if name != "home"}
    assert flat(tomllib.loads(text)) == expected
    for name, _, description in options():
        assert description, f"{name} has no description"
        if name != "home":
            line = rf"(?m)^# {re.escape(description)}.*\n{name.split('.')[1]} = "
            assert re.search(line, text), f"{name} lacks its description"
    assert re.search(r"(?m)^# home = ", text)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.name)
def test_every_shipped_configuration_loads(file: Path) -> None:
    load(file, {})


def test_the_backlog_that_our_broker_may_hold_is_no_flood_of_one_user() -> None:
    lines = [line.split() for line in (CONFIGS / "mosquitto.conf").read_text(encoding="utf-8").splitlines()]
    told = {line[0]: line[1] for line in lines if len(line) == 2}
    held = int(told["max_queued_messages"]) + int(told["max_inflight_messages"])
    assert Settings().mqtt.burst >= held
    assert load(CONFIGS / "persona.toml", {}).mqtt.burst >= held
