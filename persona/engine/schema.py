"""JSON schemas as grammars of llguidance, and whether one can be followed at all.

A hostile schema can keep the compiler busy for longer than anybody waits (13 kB of patterns under one `allOf`), past
all of its limits, and no count of its parts tells beforehand. So it is tried out in a process of its own that has
seconds and a bounded memory: `python -m persona.engine.schema` reads a grammar and prints what is wrong with it, or
nothing.
"""

import json
import re
import resource
import sys
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

SECONDS = 2  # of processor time that trying out may take
MEMORY = 1 << 30  # bytes
LARGE = "it is too large or too complex"

# Runs of spaces end: without a bound a small model may write nothing else.
_FORM: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]{1,16}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
# What llguidance says → what the caller hears. Its own words may quote the schema, and with it the user.
_REASONS = (
    (r"oneOf", "oneOf is followed only where its alternatives exclude each other; use anyOf"),
    (r"not disjoint", "its patternProperties overlap"),
    (r"look-a(?:round|head)|backreference", "a pattern with look-around or a back-reference is not supported"),
    (r"regex parse error|invalid regex", "a pattern is not a regular expression"),
    (r"Unknown format", "a format is not supported"),
    (r"Invalid type", "a type is not one of JSON Schema's"),
    (r"not present in a registry|retriev", "it refers to another document; put that under $defs"),
    (r"Pointer|Unresolvable|does not exist", "a $ref leads nowhere"),
    (r"Unsatisfiable|NoExtension", "nothing satisfies it"),
    (r"too large|too complex|max is|limit|fuel|Unable to determine|too many|recursion", LARGE),
    (r"must be|Expected|expected|has to be", "a keyword has a value of the wrong type"),
)


def grammar(schema: dict[str, Any]) -> str:
    """The grammar of a schema; whether it is sound shows only when it is compiled."""
    schema = {name: value for name, value in schema.items() if name != "x-guidance"}  # would override the form
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM))  # type: ignore[arg-type]


def limits() -> LLParserLimits:
    """Of one grammar: a mask takes milliseconds at most, and its states some ten megabytes."""
    return LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False)


def compiled(text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """The matcher of a grammar, which may be in error. Lets go of the GIL meanwhile."""
    return LLMatcher(tokenizer, text, log_level=0, limits=limits())


def problem(text: str) -> str:
    """What is wrong with a grammar, or ""."""
    matcher = compiled(text, LLTokenizer("byte"))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _reason(matcher.get_error()) if matcher.is_error() else ""


def _reason(error: str) -> str:
    if unserved := re.match(r"Unimplemented keys: \[([^\]]*)\]", error):
        return f"these keywords are not supported: {unserved[1].replace(chr(34), '')}"
    return next((reason for pattern, reason in _REASONS if re.search(pattern, error)), "it cannot be followed")


def main() -> None:
    """Try out the grammar on stdin, within limits that end this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(problem(sys.stdin.read()))


if __name__ == "__main__":
    main()
