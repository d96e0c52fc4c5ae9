"""JSON as it comes in and goes out, on every surface.

msgspec refuses NaN, broken Unicode and bottomless nesting by itself; what it refuses becomes one sentence that names
the field and never quotes its content.
"""

import re
from typing import Any, TypeVar

import msgspec

from persona.errors import RequestError

T = TypeVar("T")

_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")


def decode(content: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises RequestError that names the field, never its content."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise RequestError("The body is not valid JSON.", code="invalid_json") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.", code="invalid_json") from None


def dumps(value: Any) -> str:
    """JSON text of an answer."""
    return msgspec.json.encode(value).decode()


def convert(value: Any, kind: type[T]) -> T:
    """A decoded value as `kind`, with the same errors as `decode`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None


def _misfit(sentence: str) -> RequestError:
    """msgspec's sentence names types and places; the place becomes `param`."""
    match = _PLACE.search(sentence)
    what = _PLACE.sub("", sentence).replace("`", "")
    missing = re.search(r"missing required field (\w+)", what)
    place = ".".join(filter(None, (match[1] if match else "", missing[1] if missing else "")))
    return RequestError(f"{what}{f' at {place}' if match else ''}.", code="invalid_type", param=place or None)
