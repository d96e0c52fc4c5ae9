"""Histories out of a git repository: whose words they are, what is left out, in which order."""

import json
import subprocess
from pathlib import Path

import commits
import pytest

from jobs import people

LONG = " ".join(f"word{number}" for number in range(20))


def committed(repo: Path, author: str, at: int, message: str, *files: str) -> None:
    for file in files:
        (repo / file).write_text(f"{author} {at}", encoding="utf-8")
    told = f"{author} <{author.lower()}@example.org>"
    git = ["git", "-C", str(repo), "-c", "user.name=c", "-c", "user.email=c@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "add", "-A"], check=True)
    command = ["commit", "-q", "--allow-empty", "--author", told, "--date", f"@{at} +0000", "-m", message]
    subprocess.run([*git, *command], check=True)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    subprocess.run(["git", "init", "-q", str(made)], check=True)
    return made


def lines(repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, least: int) -> list[str]:
    monkeypatch.setattr("sys.argv", ["commits.py", "--repo", str(repo), "--least", str(least)])
    commits.main()
    return capsys.readouterr().out.splitlines()


def test_everybody_who_wrote_enough_is_there_under_a_number(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    committed(repo, "Ann", 1_700_000_200, f"later: {LONG}\n\nSigned-off-by: Ann <ann@example.org>", "a.c", "b.c")
    committed(repo, "Ann", 1_700_000_100, f"earlier: {LONG}\n\nTwo\nlines.\n\nCc: bob@example.org\nFixes: 1234")
    committed(repo, "Ann", 1_700_000_300, "too short to be anybody's style")
    committed(repo, "Bob", 1_700_000_400, f"one of Bob's: {LONG}", "c.c")
    told = lines(repo, capsys, monkeypatch, 2)
    earlier, later = (json.loads(line) for line in told)
    assert {earlier["user"], later["user"]} == {commits.called("Ann")}
    assert earlier["text"] == f"earlier: {LONG}\nTwo lines."
    assert (later["text"], later["context"]) == (f"later: {LONG}", [{"author": "files", "text": "a.c, b.c"}])
    assert earlier["context"] == []
    assert earlier["ts"] < later["ts"]
    assert "Ann" not in "".join(told)
    file = tmp_path / "commits.jsonl"
    file.write_text("\n".join(told), encoding="utf-8")
    (person,) = people.read(file)
    assert [item.text for item in person.items] == [earlier["text"], later["text"]]


def test_long_messages_end_after_so_many_words(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(repo, "Ann", 1_700_000_100, " ".join(f"w{number}" for number in range(300)))
    (line,) = lines(repo, capsys, monkeypatch, 1)
    assert json.loads(line)["text"].split()[-1] == f"w{commits.LONGEST - 1}"
