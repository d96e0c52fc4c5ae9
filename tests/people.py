"""Files of several people's histories, as experiments read them."""

import json
from pathlib import Path
from random import Random

VOICES = {
    "ann": ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"],
    "bob": ["Привет", "мир", "12:30", "and", "CamelCase", "snake_case", "there"],
    "eve": ["user", "assistant", "hello", "how", "are", "you", "fine", "thank"],
}


def write(file: Path, count: int = 60, people: tuple[str, ...] = ("ann", "bob", "eve")) -> Path:
    """So many messages of each, mixed in time, each person with their own few words."""
    random = Random(5)
    lines = []
    for number in range(count):
        for name in people:
            text = " ".join(random.sample(VOICES[name], 5))
            context = [{"author": "zoe", "text": " ".join(random.sample(VOICES["eve"], 3))}]
            lines.append(
                {
                    "user": name,
                    "id": f"{name}-{number}",
                    "ts": 1_700_000_000 + 60 * number,
                    "text": text,
                    "context": context,
                }
            )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file
