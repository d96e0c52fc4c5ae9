"""Several results of `persona eval --data … --json` as one: people measured apart, compared together.

    .venv/bin/python tests/bench/joined.py FIRST.json SECOND.json …

A person may stand in several files, each of another `--seed`: their figures are averaged first, message by message, so
that they count once. Prints a line of a Markdown table for each person, how many seeds there were, then each comparison
with its interval over people and messages.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs import summary
from jobs.trial import Result

SHOWN = ("base", "context", "prior", "prior_context", "adapter", "adapter_context", "wrong_user")
Runs = dict[str, dict[int, Result]]  # of each person, by seed


def read(names: Sequence[str]) -> Runs:
    """What the files tell. Raises SystemExit for what would count twice, and for a file with a gate beside one without.

    Files of before there was a seed have 0, and of before there was a gate none.
    """
    found: Runs = {}
    gates: dict[bool, str] = {}
    for name in names:
        file = json.loads(Path(name).read_text(encoding="utf-8"))
        options = file.get("options", {})
        seed = options.get("seed", 0)
        gates.setdefault(options.get("gate", False), name)
        if len(gates) > 1:
            sys.exit(f"{gates[True]} was measured with the gate, {gates[False]} without: join like with like.")
        for told in file["users"]:
            runs = found.setdefault(told["user"], {})
            if seed in runs:
                sys.exit(f"{name} has {told['user']} with seed {seed}, as a file before it: leave one of them out.")
            runs[seed] = result(told)
    return found


def result(told: dict[str, Any]) -> Result:
    """A person as `summary.as_dict` told of them."""
    made = Result(told["user"], told["tokens"], told["messages"]["tokens"], told["messages"]["nats"])
    made.reference, made.replies = told["reference"], told["replies"]
    made.recognised, made.answered = told["recognised"], told["answered"]
    made.bytes, made.seconds, made.kept = told["bytes"], told["seconds"], told.get("kept", [])
    return made


def averaged(runs: Sequence[Result]) -> Result:
    """One person under several seeds: the mean of what all of them tell. Raises SystemExit for different messages."""
    first = runs[0]
    if any(run.lengths != first.lengths or not np.allclose(run.nats["base"], first.nats["base"]) for run in runs):
        sys.exit(f"{first.name} was tested on other messages in another file: join like with like.")
    made = Result(first.name, round(np.mean([run.own_tokens for run in runs])), first.lengths)
    for condition in first.nats:
        if all(condition in run.nats for run in runs):
            made.nats[condition] = np.mean([run.nats[condition] for run in runs], axis=0).tolist()
    for part in ("reference", "replies", "recognised", "answered"):
        told = [getattr(run, part) for run in runs]
        names = [name for name in told[0] if all(name in one for one in told)]
        setattr(made, part, {name: float(np.mean([one[name] for one in told])) for name in names})
    made.kept = [way for run in runs for way in run.kept]
    made.bytes, made.seconds = round(np.mean([r.bytes for r in runs])), float(np.mean([r.seconds for r in runs]))
    return made


def seeds(found: Runs) -> list[str]:
    """Over which seeds people were averaged."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, runs in found.items():
        groups.setdefault(tuple(sorted(runs)), []).append(name)
    return [
        f"{len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'} ({', '.join(map(str, seeds))}) of {', '.join(names)}"
        for seeds, names in groups.items()
    ]


def row(one: Result) -> str:
    losses = [f"{one.loss(name):.3f}" if name in one.nats else "–" for name in SHOWN]
    gains = [
        f"{summary.gain(one, over, 'adapter_context'):.1%}" for over in ("context", "prior_context") if over in one.nats
    ]
    drift = f"{one.reference['adapter'] / one.reference['base'] - 1:+.2%}"
    forgot = f"{one.replies['adapter'] - one.replies['base']:.3f}"
    answered = " → ".join(f"{100 * one.answered[side]:.0f}" for side in ("base", "adapter") if one.answered)
    return f"| {' | '.join([one.name, str(one.own_tokens), *losses, *gains, drift, forgot, answered])} |"


def main() -> None:
    found = read(sys.argv[1:])
    people = [averaged(list(runs.values())) for runs in found.values()]
    out = [*map(row, people), "", *seeds(found)]
    for name, one in summary.summary(people).items():
        if isinstance(one, dict) and "gain" in one:
            better = f"better for {one['better'] * one['people']:.0f} of {one['people']}"
            out.append(f"{name}: {one['gain']:.1%} ({one['low']:.1%} … {one['high']:.1%}), {better}")
        else:
            out.append(f"{name}: {one}")
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
