"""Several results of `persona eval --data … --json` as one: people measured apart, compared together.

    .venv/bin/python tests/bench/joined.py FIRST.json SECOND.json …

Prints a line of a Markdown table for each person, then each comparison with its interval over people and messages.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jobs import summary
from jobs.trial import Result

SHOWN = ("base", "context", "prior", "prior_context", "adapter", "adapter_context", "wrong_user")


def result(told: dict[str, Any]) -> Result:
    """A person as `summary.as_dict` told of them."""
    made = Result(told["user"], told["tokens"], told["messages"]["tokens"], told["messages"]["nats"])
    made.reference, made.replies = told["reference"], told["replies"]
    made.recognised, made.answered = told["recognised"], told["answered"]
    made.bytes, made.seconds = told["bytes"], told["seconds"]
    return made


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
    files = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    people = [result(told) for file in files for told in file["users"]]
    out = [*map(row, people), ""]
    for name, one in summary.summary(people).items():
        if isinstance(one, dict) and "gain" in one:
            better = f"better for {one['better'] * one['people']:.0f} of {one['people']}"
            out.append(f"{name}: {one['gain']:.1%} ({one['low']:.1%} … {one['high']:.1%}), {better}")
        else:
            out.append(f"{name}: {one}")
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
