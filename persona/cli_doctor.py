"""The command `persona doctor`: the findings of persona.doctor on the screen, and an exit code for a script."""

from dataclasses import asdict

import typer
from rich.console import Console

from persona import doctor as checks
from persona.cli_screen import Json, emit, plain, settings

_COLOURS = {checks.State.OK: "green", checks.State.WARN: "yellow", checks.State.FAIL: "red"}


def doctor(context: typer.Context, json: Json = False) -> None:
    """Check model, device, weights, database, disk and memory, and say what to do. Exit code 1: persona cannot run."""
    configuration = settings(context)
    findings = []
    console = Console()
    for finding in checks.examine(configuration):
        findings.append(finding)
        if not json:
            _show(console, finding)
    if json:
        emit([asdict(finding) for finding in findings])
    if any(finding.state is checks.State.FAIL for finding in findings):
        raise typer.Exit(1)


def _show(console: Console, finding: checks.Finding) -> None:
    mark = f"[{_COLOURS[finding.state]}]{finding.state:4}[/]"
    console.print(mark, f"{finding.name:9}", end=" ", highlight=False)
    console.print(plain(finding.found), markup=False, highlight=False, soft_wrap=True)
    if finding.advice:
        console.print(" " * 15 + finding.advice, markup=False, highlight=False, soft_wrap=True)
