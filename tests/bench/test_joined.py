"""Results of several experiments joined: everybody once, however many seeds they were measured with."""

import json
import sys
from pathlib import Path

import joined
import pytest

from jobs import summary
from jobs.trial import Result


def person(name: str, under: list[float], lengths: list[int] | None = None) -> Result:
    made = Result(name, 1000, lengths or [10] * len(under), reference={"base": 2.0, "adapter": 2.02})
    made.replies, made.bytes, made.seconds = {"base": 1.0, "adapter": 1.1}, 1000, sum(under)
    made.nats = {"base": [40.0] * len(under), "context": [20.0] * len(under)}
    made.nats |= {"adapter": under, "adapter_context": under}
    return made


def file(folder: Path, seed: int | None, *people: Result) -> str:
    """What `persona eval --json` prints; without a seed as it did before there were any."""
    said = {"users": [summary.as_dict(one) for one in people]}
    made = folder / f"{seed}-{'-'.join(one.name for one in people)}.json"
    made.write_text(json.dumps(said | ({} if seed is None else {"options": {"seed": seed}})), encoding="utf-8")
    return str(made)


def test_seeds_of_a_person_are_averaged_by_message_before_people_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        file(tmp_path, None, person("ann", [10.0, 20.0]), person("bob", [20.0, 20.0])),
        file(tmp_path, 1, person("ann", [14.0, 18.0])),
        file(tmp_path, 1, person("bob", [16.0, 20.0])),
        file(tmp_path, 0, person("eve", [18.0, 18.0])),
    ]
    found = joined.read(files)
    ann = joined.averaged(list(found["ann"].values()))
    assert ann.nats["adapter_context"] == [12.0, 19.0]
    assert (ann.lengths, ann.bytes, ann.seconds) == ([10, 10], 1000, 31.0)
    assert ann.reference == {"base": 2.0, "adapter": 2.02}
    monkeypatch.setattr(sys, "argv", ["joined.py", *files])
    joined.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[:3]] == ["| ann", "| bob", "| eve"]
    assert "2 seeds (0, 1) of ann, bob" in lines
    assert "1 seed (0) of eve" in lines
    (compared,) = [line for line in lines if line.startswith("adapter_context_over_context: ")]
    assert "better for 3 of 3" in compared
    assert compared.startswith("adapter_context_over_context: 12.5% (")  # of 22.5, 5 and 10 %


def test_what_would_count_twice_or_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    first, again = file(tmp_path, None, person("ann", [10.0])), file(tmp_path, 0, person("ann", [10.0]))
    with pytest.raises(SystemExit, match="has ann with seed 0, as a file before it"):
        joined.read([first, again])
    with pytest.raises(SystemExit, match="ann was tested on other messages"):
        joined.averaged([person("ann", [10.0], [5]), person("ann", [10.0], [6])])
    others = person("ann", [10.0])
    others.nats["base"] = [41.0]
    with pytest.raises(SystemExit, match="ann was tested on other messages"):
        joined.averaged([person("ann", [10.0]), others])
    gated = tmp_path / "gated.json"
    gated.write_text(json.dumps({"users": [], "options": {"seed": 1, "gate": True}}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"gated.json was measured with the gate, .*ann.json without"):
        joined.read([first, str(gated)])


def test_seeds_of_which_not_every_round_was_kept_are_averaged_too() -> None:
    whole, part = person("ann", [10.0]), person("ann", [14.0])
    whole.kept, part.kept, part.own_tokens = ["whole", "half"], ["whole", "nothing"], 500
    ann = joined.averaged([whole, part])
    assert (ann.own_tokens, ann.nats["adapter"]) == (750, [12.0])
    assert summary.summary([ann])["kept"] == {"whole": 2, "half": 1, "nothing": 1}
