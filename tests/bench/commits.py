"""Another kind of text: what people write into the history of a program, out of any git repository.

    .venv/bin/python tests/bench/commits.py --repo PATH [--head COMMIT] [--since 2015-01-01] [--least 90] > FILE.jsonl

One line a commit message, as `persona eval` and `persona prior train` read them: its author under a number, the names
of the changed files as what stood before it, the text without trailers (Signed-off-by and the like: nobody's own words)
and cut after 100 words. Merges and texts below 15 words are left out, and so is who wrote fewer than --least. Authors
are called by the first 8 digits of the SHA-256 of their name, and stand in its order: a split is nobody's choice.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime

FORMAT = "%x01%H%x00%an%x00%at%x00%B%x00"
TRAILER = re.compile(r"^(?:[A-Z][A-Za-z-]+(?:-by|-to|-from)|Cc|Fixes|Link|Message-Id|Message-ID|Change-Id): ?.*$", re.M)
SHORTEST, LONGEST = 15, 100  # words


def commits(repo: str, head: str, since: str) -> Iterator[tuple[str, str, int, str, list[str]]]:
    """Hash, author, seconds, message and files of each, oldest first."""
    command = ["git", "-C", repo, "log", "--no-merges", "--reverse", "--name-only", f"--since={since}"]
    told = subprocess.run([*command, f"--format={FORMAT}", head], check=True, capture_output=True).stdout
    for one in told.decode("utf-8", "replace").split("\x01")[1:]:
        name, author, seconds, message, files = one.split("\0")
        yield name, author, int(seconds), message, files.split()


def said(message: str) -> str:
    """The author's own words, in paragraphs; empty if there are too few."""
    paragraphs = [" ".join(part.split()) for part in TRAILER.sub("", message).split("\n\n")]
    words = "\n".join(part for part in paragraphs if part).split(" ")
    return " ".join(words[:LONGEST]) if len(words) >= SHORTEST else ""


def called(author: str) -> str:
    return hashlib.sha256(author.encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--head", default="HEAD")
    parser.add_argument("--since", default="2015-01-01")
    parser.add_argument("--least", type=int, default=90)
    asked = parser.parse_args()
    people: dict[str, list[dict[str, object]]] = defaultdict(list)
    for name, author, seconds, message, files in commits(asked.repo, asked.head, asked.since):
        if text := said(message):
            before = [{"author": "files", "text": ", ".join(files[:8])}] if files else []
            line = {"user": called(author), "id": name[:12], "ts": datetime.fromtimestamp(seconds, UTC).isoformat()}
            people[called(author)].append({**line, "context": before, "text": text})
    for author in sorted(people):
        if len(people[author]) >= asked.least:
            for line in sorted(people[author], key=lambda line: str(line["ts"])):
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
