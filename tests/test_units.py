"""The units of systemd: correct to its own checker, as hardened as the documents say, and true to the code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from parts import program

from persona.settings import Http, options

ROOT = Path(__file__).parent.parent
UNITS = ROOT / "systemd"
DROP_INS = sorted(path.name for path in (UNITS / "persona.service.d").iterdir())


def installed(folder: Path, *drop_ins: str) -> Path:
    """The units in a folder of their own, with those drop-ins and a program that exists here; the service's file."""
    for name in ("persona.service", "persona.socket"):
        text = (UNITS / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("/opt/persona/bin/persona", shutil.which("true") or ""))
    for name in drop_ins:
        (folder / "persona.service.d").mkdir(exist_ok=True)
        shutil.copy(UNITS / "persona.service.d" / name, folder / "persona.service.d" / name)
    return folder / "persona.service"


def analyze(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([program("systemd-analyze"), *map(str, words)], capture_output=True, text=True, timeout=60)


def options_of(name: str) -> dict[str, list[str]]:
    """Every `Key=value` of a unit, in order."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"(?m)^(\w+)=(.*)$", (UNITS / name).read_text(encoding="utf-8")):
        found.setdefault(key, []).append(value)
    return found


def test_the_checker_of_systemd_has_nothing_to_say(tmp_path: Path) -> None:
    service = installed(tmp_path, *DROP_INS)
    checked = analyze("verify", service, tmp_path / "persona.socket")
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_misspelt_option_would_be_found(tmp_path: Path) -> None:
    service = installed(tmp_path)
    service.write_text(service.read_text().replace("WatchdogSec", "WatchdogSecs"))
    assert "WatchdogSecs" in analyze("verify", service).stderr


@pytest.mark.parametrize("drop_ins", [(), ("gpu.conf",)], ids=["cpu", "gpu"])
def test_the_unit_is_hardened_to_the_score_in_the_documents(tmp_path: Path, drop_ins: tuple[str, ...]) -> None:
    checked = analyze("security", "--offline=true", "--threshold=25", installed(tmp_path, *drop_ins))
    assert checked.returncode == 0, checked.stdout
    score = re.search(r"Overall exposure level for persona.service: ([\d.]+)", checked.stdout)
    assert score is not None
    assert float(score[1]) <= 2.5
    if analyze("--version").stdout.startswith("systemd 252 "):  # others weigh differently
        assert f"**{score[1]}**" in (ROOT / "docs/DEPLOY.md").read_text(encoding="utf-8")


def test_what_would_break_the_model_or_the_network_is_not_set() -> None:
    unit = options_of("persona.service")
    assert not {"MemoryDenyWriteExecute", "PrivateNetwork", "DynamicUser"} & unit.keys()
    assert unit["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6"]
    assert unit["Type"] == ["notify"]


def test_a_stop_may_take_as_long_as_running_replies_and_more() -> None:
    assert float(options_of("persona.service")["TimeoutStopSec"][0]) >= Http().shutdown_seconds + 60


def test_the_devices_of_a_gpu_stand_in_the_drop_in_only() -> None:
    assert options_of("persona.service")["PrivateDevices"] == ["yes"]
    assert not {"DeviceAllow", "DevicePolicy"} & options_of("persona.service").keys()
    assert "DeviceAllow" in options_of("persona.service.d/gpu.conf")


def test_settings_that_a_unit_sets_are_named_as_the_service_reads_them() -> None:
    known = {f"PERSONA_{name.upper().replace('.', '__')}" for name, _, _ in options()} | {"PERSONA_CONFIG"}
    mqtt = any(name.startswith("mqtt.") for name, _, _ in options())
    for name in ("persona.service", *(f"persona.service.d/{drop_in}" for drop_in in DROP_INS)):
        for word in options_of(name).get("Environment", []):
            variable = word.split("=")[0]
            if variable.startswith("PERSONA_") and (mqtt or not variable.startswith("PERSONA_MQTT")):
                assert variable in known


def test_the_socket_listens_where_the_settings_would() -> None:
    assert options_of("persona.socket")["ListenStream"] == [f"{Http().host}:{Http().port}"]


def test_nobody_elsewhere_reaches_the_port_that_systemd_holds() -> None:
    """The filter of a service does not reach a socket that it was handed."""
    for name in ("persona.socket", "persona.service"):
        found = options_of(name)
        assert (found["IPAddressDeny"], found["IPAddressAllow"]) == (["any"], ["localhost"]), name
