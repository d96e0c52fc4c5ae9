"""What forms.py found, in one table: each arm's share of the control's gain, over people and seeds.

    .venv/bin/python tests/bench/shares.py FILE.jsonl … [--control dense]

A person's figures are averaged over the seeds first, so that they count once; only people and seeds count whom all arms
have. Prints a line of a Markdown table for each person and arm, then one line for each arm: the mean gain, its share of
the control's with an interval (95 %, people drawn anew with replacement), own over another's, drift, forgetting.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
FIGURES = ("base", "own", "gain", "wrong", "over", "drift", "forgetting", "bytes", "steps")
Runs = dict[str, dict[tuple[str, int], dict[str, Any]]]  # by arm, then by person and seed
Table = dict[str, dict[str, dict[str, float]]]  # by arm, then by person


def read(names: Sequence[Path]) -> Runs:
    """Raises SystemExit where a person stands twice with one seed."""
    found: Runs = {}
    for name in names:
        for line in name.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            runs, place = found.setdefault(told["arm"], {}), (told["person"], told.get("seed", 0))
            if place in runs:
                sys.exit(
                    f"{name} has {told['person']} under {told['arm']} with seed {place[1]} once more: leave one out."
                )
            runs[place] = told | ({} if told["wrong"] is None else {"over": told["wrong"] - told["own"]})
    return found


def averaged(runs: Runs) -> Table:
    """The mean over the seeds that all arms have."""
    common = sorted(set.intersection(*(set(some) for some in runs.values())))
    if not common:
        sys.exit("No person has all arms with one seed.")
    table: Table = {arm: {} for arm in runs}
    for arm, some in runs.items():
        for person in dict.fromkeys(person for person, _ in common):
            mine = [some[place] for place in common if place[0] == person]
            means = {name: [one[name] for one in mine if one.get(name) is not None] for name in FIGURES}
            table[arm][person] = {name: float(np.mean(values)) for name, values in means.items() if values}
            table[arm][person]["seeds"] = len(mine)
    return table


def share(mine: NDArray[np.float64], control: NDArray[np.float64]) -> dict[str, Any]:
    """Of the control's mean gain: [people] each. The interval is that of other people drawn from the same crowd."""
    drawn = np.random.default_rng(0).integers(len(mine), size=(DRAWS, len(mine)))
    shares = mine[drawn].mean(1) / control[drawn].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {"share": round(float(mine.mean() / control.mean()), 3), "interval": [round(low, 3), round(high, 3)]}


def column(rows: dict[str, dict[str, float]], name: str) -> NDArray[np.float64]:
    return np.array([row[name] for row in rows.values() if name in row])


def line(person: str, arm: str, row: dict[str, float], control: float) -> str:
    """Of a Markdown table."""
    losses = [f"{row[name]:.3f}" for name in ("base", "own")]
    another = f"{row['wrong']:.3f}" if "wrong" in row else "-"
    costs = f"{row['drift']:+.2%}", f"{row['forgetting']:+.3f}"
    told = (person, f"{row['seeds']:.0f}", arm.split(":")[0], *losses, f"{row['gain'] / control:.3f}", another, *costs)
    return "| " + " | ".join(told) + " |"


def summed(arm: str, rows: dict[str, dict[str, float]], control: NDArray[np.float64]) -> dict[str, Any]:
    """What an arm comes to. control: gains of the control, in the order of `rows`."""
    told = {"arm": arm, "people": len(rows), "gain": round(float(column(rows, "gain").mean()), 4)}
    told |= share(column(rows, "gain"), control)
    if len(over := column(rows, "over")):
        told |= {"own_over_another": round(float(over.mean()), 4), "own_better": f"{(over > 0).sum()} of {len(over)}"}
    for name in ("drift", "forgetting"):
        values = column(rows, name)
        told |= {name: round(float(values.mean()), 4), f"worst_{name}": round(float(values.max()), 4)}
    return told | {"bytes": round(float(column(rows, "bytes").mean()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--control", default="dense", help="beginning of the arm that the others are compared with")
    asked = parser.parse_args()
    table = averaged(read(asked.files))
    controls = [arm for arm in table if arm.startswith(asked.control)]
    if len(controls) != 1:
        sys.exit(f"{len(controls)} arms begin with {asked.control!r}: name one with --control, of {', '.join(table)}.")
    control = table[controls[0]]
    lines = [line(person, arm, table[arm][person], control[person]["gain"]) for person in control for arm in table]
    lines += [json.dumps(summed(arm, rows, column(control, "gain"))) for arm, rows in table.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
