"""Forms compared over people and seeds: everybody once, and only where all arms were measured."""

import json
import sys
from pathlib import Path

import pytest
import shares


def told(person: str, arm: str, gain: float, seed: int | None = 0, wrong: float | None = 3.5) -> dict[str, object]:
    """A line of forms.py; without a seed as it was before there were any."""
    made = {"person": person, "arm": arm, "base": 4.0, "own": 4.0 - gain, "gain": gain, "wrong": wrong, "steps": 9}
    return made | {"drift": 0.01, "forgetting": 0.02, "bytes": 100} | ({} if seed is None else {"seed": seed})


def file(folder: Path, name: str, *lines: dict[str, object]) -> Path:
    made = folder / name
    made.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return made


def test_seeds_count_once_a_person_and_only_where_all_arms_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        file(
            tmp_path,
            "first",
            *(told("ann", "dense:rank=8", 1.0, None), told("ann", "fused", 0.8, None, wrong=None)),
            *(told("bob", "dense:rank=8", 0.5), told("bob", "fused", 0.6), told("eve", "fused", 9.0)),
        ),
        file(tmp_path, "second", told("ann", "dense:rank=8", 1.2, 1), told("ann", "fused", 1.0, 1)),
        file(tmp_path, "third", told("ann", "fused", 9.0, 2)),
    ]
    monkeypatch.setattr(sys, "argv", ["shares.py", *map(str, files)])
    shares.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:3] for line in lines[:4]] == [
        ["| ann", "2", "dense"],
        ["| ann", "2", "fused"],
        ["| bob", "1", "dense"],
        ["| bob", "1", "fused"],
    ]
    control, fused = map(json.loads, lines[4:])
    assert (control["share"], control["interval"]) == (1.0, [1.0, 1.0])
    assert (fused["people"], fused["gain"]) == (2, 0.75)
    assert fused["share"] == pytest.approx((0.9 + 0.6) / (1.1 + 0.5), abs=1e-3)
    assert fused["interval"] == [pytest.approx(0.9 / 1.1, abs=1e-3), 1.2]  # of two people, one may be drawn twice
    assert fused["own_better"] == "2 of 2"


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    twice = [file(tmp_path, name, told("ann", "fused", 1.0)) for name in ("one", "two")]
    with pytest.raises(SystemExit, match="ann under fused with seed 0 once more"):
        shares.read(twice)
    apart = file(tmp_path, "apart", told("ann", "fused", 1.0), told("bob", "dense", 1.0))
    with pytest.raises(SystemExit, match="No person has all arms"):
        shares.averaged(shares.read([apart]))
