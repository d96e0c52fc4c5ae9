"""Text as the full-text index sees it, and a question put to that index.

Scripts without spaces (Chinese, Japanese, Thai, …) are indexed character by character and asked for in pairs, so that
a word is found inside a sentence. Whatever the text holds, the question is a valid one: every word stands quoted.
"""

import itertools
import re
from collections.abc import Iterator

from storage.normal import normal

_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
_CHARACTER = re.compile(f"([{_SPACELESS}])")
_RUN = re.compile(f"[{_SPACELESS}]+")
_BREAK = re.compile(r"[\s\x00-/:-@\[-`{-\x7f]+")
_MOST = 32  # words in a question
_LONGEST = 10_000  # characters of a text that are looked at for a question


def indexed(text: str) -> str:
    """`text` with every character of a spaceless script standing alone."""
    return _CHARACTER.sub(r" \1 ", normal("NFKC", text))


def phrases(text: str) -> list[str]:
    """The distinct words of `text`, the first 32 of them, each as a query of its own."""
    plain = normal("NFKC", text[:_LONGEST]).casefold()
    return [f'"{word}"' for word in list(dict.fromkeys(_words(plain)))[:_MOST]]


def _words(text: str) -> Iterator[str]:
    for piece in _BREAK.split(_RUN.sub(" ", text)):
        if len(piece) > 1 or piece.isdigit() or not piece.isascii():
            yield piece
    for run in _RUN.findall(text):
        pairs = [f"{first} {second}" for first, second in itertools.pairwise(run)]
        yield from pairs or [run]
