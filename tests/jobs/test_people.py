"""Histories of several people in one file: who is in it, in which order, and what is wrong with it."""

import json
from pathlib import Path

import people as files
import pytest

from jobs import people
from persona.errors import RequestError
from storage.imports import MAX_CHARS


def test_everybody_is_read_with_their_own_messages(tmp_path: Path) -> None:
    found = people.read(files.write(tmp_path / "all.jsonl", count=4))
    assert [person.name for person in found] == ["ann", "bob", "eve"]
    assert all([item.id for item in person.items] == [f"{person.name}-{i}" for i in range(4)] for person in found)
    assert found[0].items[0].context[0].author == "zoe"


def test_messages_stand_in_the_order_of_time_whatever_that_of_the_file(tmp_path: Path) -> None:
    file = files.write(tmp_path / "all.jsonl", count=4)
    expected = people.read(file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(reversed(lines)), encoding="utf-8")
    assert people.read(file, only=["ann", "bob", "eve"]) == expected


def test_messages_of_one_time_stand_as_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    times = ["2026-03-01T12:00:00Z", 1, "2026-03-01T13:00:00+01:00", "2026-03-01T12:00:00"]
    lines = [json.dumps({"user": "ann", "ts": ts, "text": f"number {place}"}) for place, ts in enumerate(times)]
    file.write_text("\n".join(lines), encoding="utf-8")
    assert [item.text for item in people.read(file)[0].items] == [f"number {place}" for place in (1, 0, 2, 3)]


def test_people_can_be_chosen_left_out_and_limited(tmp_path: Path) -> None:
    file = files.write(tmp_path / "all.jsonl", count=1)

    def names(**how: object) -> list[str]:
        return [person.name for person in people.read(file, **how)]  # type: ignore[arg-type]

    assert names(only=["eve", "ann"]) == ["eve", "ann"]
    assert names(without=["ann"]) == ["bob", "eve"]
    assert names(limit=2) == ["ann", "bob"]
    assert names(only=["eve", "bob"], limit=1) == ["eve"]
    assert names(only=["eve", "ann", "eve"]) == ["eve", "ann"]
    assert names(only=["eve", "eve", "ann"], limit=2) == ["eve", "ann"]


def test_a_text_that_is_too_long_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text(f'{{"user": "ann", "ts": 1, "text": "{"a" * (MAX_CHARS + 1)}"}}\n', encoding="utf-8")
    with pytest.raises(RequestError, match=r"Line 1 of .* longer than"):
        people.read(file)


BAD = [
    ("[1]\n", "Line 1 of .*all.jsonl: "),
    ('{"user": "ann", "ts": 1, "text": "a"}\n{"user": "ann"}\n', "Line 2 of"),
    ('{"ts": 1, "text": "a"}\n', "Line 1 of .* user"),
    ('{"user": "", "ts": 1, "text": "a"}\n', "Line 1 of .*: user is empty"),
    ('\n{"user": " ", "ts": 1, "text": "a"}\n', "Line 2 of .*: user is empty"),
    ('{"user": "ann", "ts": "yesterday", "text": "a"}\n', "Line 1 of .*all.jsonl: ts is"),
    ('\n{"user": "ann", "ts": 1, "text": " "}\n', "Line 2 of .* no text"),
    ('{"user": "ann", "ts": 1, "text": "a", "role": "king"}\n', "Line 1 of .*all.jsonl: role"),
    ("", "holds no history"),
    ("\n\n", "holds no history"),
    ('{"user": "ann", "ts": 1, "text": "s\xe9cret\n', "Line 1 of"),
]


@pytest.mark.parametrize(("content", "said"), BAD)
def test_what_is_no_history_is_refused_by_line_and_never_quoted(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=said) as refused:
        people.read(file)
    assert "cret" not in refused.value.message


def test_an_unknown_name_and_a_missing_file_are_told(tmp_path: Path) -> None:
    file = files.write(tmp_path / "all.jsonl", count=1)
    with pytest.raises(RequestError, match="nobody called zoe"):
        people.read(file, only=["zoe"])
    with pytest.raises(RequestError, match="nobody called zoe"):
        people.read(file, without=["zoe"])
    with pytest.raises(RequestError, match="holds no history"):
        people.read(file, without=["ann", "bob", "eve"])
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        people.read(tmp_path / "none.jsonl")
