"""The documents name what the code has: every setting, route, command, model file and link."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import typer
from aiohttp import web

from persona.api import routes
from persona.api.metrics import Metrics
from persona.cli import app
from persona.settings import options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "tests/data/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
DOCS = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def commands() -> Iterator[str]:
    """Every command as it is typed, without `persona`."""
    for command in app.registered_commands:
        assert command.callback is not None
        yield command.name or command.callback.__name__
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        for command in group.typer_instance.registered_commands:
            yield f"{group.name} {command.name}"


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"`(persona )?{command}`", README), f"README.md does not name `persona {command}`"


def paths(routed: Iterable[web.RouteDef]) -> list[str]:
    """Each route as `METHOD /path`, its variables without their patterns."""
    return [f"{route.method} {re.sub(r':[^}]*', '', route.path)}" for route in routed]


@pytest.mark.parametrize("route", paths((*routes.OPS, *routes.USERS, *routes.OLLAMA)))
def test_every_route_is_in_the_readme(route: str) -> None:
    assert f"`{route}`" in README, f"README.md does not name {route}"


@pytest.mark.parametrize("route", paths(routes.ADMIN))
def test_every_route_of_the_admin_socket_is_documented(route: str) -> None:
    assert f"`{route}`" in DOCS, f"docs/ does not name {route}"


def test_every_metric_is_documented() -> None:
    families = list(Metrics().registry.collect())
    named = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert not {name for name in named if f"`{name}`" not in DOCS}


@pytest.mark.parametrize("setting", [name for name, _, _ in options()])
def test_every_setting_is_in_the_listing(setting: str) -> None:
    key = setting.split(".")[-1]
    assert re.search(rf"(?m)^(# )?{key} = ", (ROOT / "configs/persona.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`(\w+\.\w+)`", DOCS))))
def test_settings_named_in_the_documents_exist(setting: str) -> None:
    known = {name for name, _, _ in options()}
    if setting.split(".")[0] in {name.split(".")[0] for name in known}:
        assert setting in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "file", sorted(set(re.findall(r"`((?:persona|jobs|storage|tests|configs)/[\w/.]+\.\w+)`", DOCS)))
)
def test_files_named_in_the_documents_exist(file: str) -> None:
    assert (ROOT / file).exists()
