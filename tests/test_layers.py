"""Imports point down only, third-party packages stay behind their fences, and nothing unpickles."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for top in ("persona", "jobs", "storage") for file in (ROOT / top).rglob("*.py"))

# Prefix of a module → (row, package). A longer prefix wins; inside a package imports are free but acyclic.
ROWS: dict[str, tuple[int, str]] = {
    "persona.cli": (5, "persona"), "persona.app": (5, "persona"), "persona.doctor": (5, "persona"),
    "persona.__main__": (5, "persona"), "persona.engine.main": (5, "engine process"),
    "persona.api": (4, "api"), "persona.ingest": (4, "ingest"), "jobs.schedule": (4, "schedule"),
    "persona.chat": (3, "chat"), "persona.events": (3, "events"), "persona.pulse": (3, "pulse"), "jobs": (3, "jobs"),
    "persona.engine": (2, "engine"), "storage": (2, "storage"), "persona.prompt": (2, "prompt"),
    "persona.frames": (2, "frames"),
    "persona": (1, "ground"), "persona.settings": (1, "ground"), "persona.domain": (1, "ground"),
    "persona.errors": (1, "ground"),
}  # fmt: skip

FENCES: dict[str, tuple[str, ...]] = {
    "aiohttp": ("persona.api", "persona.app", "persona.cli", "persona.engine.remote"),
    "sqlalchemy": ("storage",),
    "alembic": ("storage",),
    "sqlite3": ("storage.database",),
    "aiomqtt": ("persona.ingest",), "paho": ("persona.ingest",), "amqtt": ("persona.ingest",),
    "apscheduler": ("jobs.schedule",),
    "torch": ("persona.engine", "jobs.trainer", "jobs.sparse"),
    "triton": ("persona.engine.kernels",),
    "bitsandbytes": ("persona.engine.weights", "persona.engine.quantize"),
    "llguidance": ("persona.engine.schema", "persona.engine.grammar"),
    "pickle": (), "dill": (), "cloudpickle": (), "shelve": (), "marshal": (), "joblib": (),
}  # fmt: skip


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Every module that a file names, wherever in it the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else str(node.module) for name in inner)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def within(module: str, prefix: str) -> bool:
    """Whether `module` is `prefix`, below it, or a part of it split off as prefix_part."""
    return module == prefix or module.startswith((prefix + ".", prefix + "_"))


def place(module: str) -> tuple[int, str]:
    return ROWS[max((prefix for prefix in ROWS if within(module, prefix)), key=len)]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    row, package = place(name_of(file))
    for target in imports(file):
        if target.split(".")[0] in ("persona", "jobs", "storage"):
            below, other = place(target)
            assert package == other or below < row, f"{name_of(file)} (row {row}) imports {target} (row {below})"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_third_party_packages_stay_behind_their_fences(file: Path) -> None:
    for target in imports(file):
        for library, allowed in FENCES.items():
            if within(target, library):
                assert any(within(name_of(file), door) for door in allowed), f"{name_of(file)} imports {target}"


def test_sql_dialects_are_named_in_the_database_file_only() -> None:
    for file in FILES:
        if name_of(file) != "storage.database":
            assert not any("dialects" in target for target in imports(file)), name_of(file)


def test_no_import_cycle() -> None:
    graph = {name_of(file): {t for t in imports(file) if is_module(t)} - {name_of(file)} for file in FILES}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"a cycle among {sorted(graph)}"
