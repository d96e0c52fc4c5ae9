"""Unicode normalisation in time linear in the text, whatever stands in it.

Python puts the marks over one letter in order in time quadratic in their number: 64 thousand of them take seconds. As
in the stream-safe format of Unicode (UAX #15), no more than 30 count; real text has a few.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Literal

_MOST = 30  # marks in a row
_MANY = re.compile(rf"[^\x00-\u02ff]{{{_MOST + 1},}}")  # no mark lies below


def normal(form: Literal["NFC", "NFKC"], text: str) -> str:
    """`text` in that form, without the marks beyond the thirtieth in a row."""
    return unicodedata.normalize(form, _MANY.sub(lambda found: _bounded(found[0]), text))


def _bounded(text: str) -> str:
    kept, marks = [], 0
    for sign in text:
        marks = marks + 1 if _is_mark(sign) else 0
        if marks <= _MOST:
            kept.append(sign)
    return "".join(kept)


@lru_cache(1 << 14)
def _is_mark(sign: str) -> bool:
    """Whether it stands over or under a letter before it, or becomes what does."""
    return unicodedata.combining(unicodedata.normalize("NFKD", sign)[0]) > 0
