"""What a client may ask of sampling: the same bounds on every surface.

A value outside its bounds is refused by the name that it has on the wire, before anything is stored or queued.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from persona.engine.protocol import Sampling
from persona.errors import RequestError

DEFAULT_TEMPERATURE = 0.7  # a small model wanders at OpenAI's 1.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1 << 17  # that clients may name as a bound
_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens that a reply may have, and tokens that there are."""

    reply: int
    vocab: int


class Wishes(msgspec.Struct, kw_only=True):
    """The fields of a body that shape a reply. top_k, min_p and repetition_penalty are named as vLLM has them."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class Names:
    """What the fields are called on one surface: `place` stands before all, say "options."."""

    def __init__(self, place: str = "", other: Mapping[str, str] | None = None) -> None:
        self._place, self._other = place, other or {}

    def __call__(self, field: str) -> str:
        return self._place + self._other.get(field, field)


def sampling(wishes: Wishes, limits: Limits, names: Names | None = None) -> Sampling:
    """The values as the engine takes them. Raises RequestError that names the field."""
    call = names or Names()
    heat = _within(call("temperature"), wishes.temperature, 0, 2, DEFAULT_TEMPERATURE)
    nucleus = _within(call("top_p"), wishes.top_p, 0, 1, 1.0)
    if nucleus == 0:  # the smallest nucleus is the likeliest token
        heat, nucleus = 0.0, 1.0
    if wishes.seed is not None and not -_SEED <= wishes.seed < _SEED:
        raise refused(call("seed"), "does not fit into 64 bits")
    return Sampling(
        temperature=heat,
        top_p=nucleus,
        seed=wishes.seed,
        stop=_stops(call("stop"), wishes.stop),
        top_k=_top_k(call("top_k"), wishes.top_k),
        min_p=_within(call("min_p"), wishes.min_p, 0, 1, 0.0),
        frequency_penalty=_within(call("frequency_penalty"), wishes.frequency_penalty, -2, 2, 0.0),
        presence_penalty=_within(call("presence_penalty"), wishes.presence_penalty, -2, 2, 0.0),
        repetition_penalty=_within(call("repetition_penalty"), wishes.repetition_penalty, 0.1, 10, 1.0),
        logit_bias=_biases(call("logit_bias"), wishes.logit_bias or {}, limits.vocab),
    )


def max_tokens(name: str, wanted: int | None, most: int) -> int | None:
    """A bound: `most` holds whatever is asked for. None: as many as fit."""
    if wanted is not None and not 1 <= wanted <= MAX_TOKENS:
        raise refused(name, f"lies between 1 and {MAX_TOKENS}")
    return None if wanted is None else min(wanted, most)


def choices(wanted: int | None) -> int:
    """How many replies are asked for."""
    if wanted is not None and not 1 <= wanted <= MAX_CHOICES:
        raise refused("n", f"lies between 1 and {MAX_CHOICES}")
    return wanted or 1


def top_logprobs(name: str, wanted: int) -> int:
    """How many alternatives are told with each token."""
    if not 0 <= wanted <= MAX_TOP_LOGPROBS:
        raise refused(name, f"lies between 0 and {MAX_TOP_LOGPROBS}")
    return wanted


def refused(name: str, bounds: str) -> RequestError:
    """The refusal of a value: its name, and what may stand there."""
    return RequestError(f"{name} {bounds}.", code="unsupported_value", param=name)


def _within(name: str, value: float | None, low: float, high: float, default: float) -> float:
    if value is None:
        return default
    if not low <= value <= high:
        raise refused(name, f"lies between {low} and {high}")
    return value


def _top_k(name: str, value: int | None) -> int:
    """-1 and 0 both mean all tokens, as with vLLM and Ollama."""
    if value is None or value in (-1, 0):
        return 0
    if not 0 < value < _SEED:
        raise refused(name, "is a number of tokens, or -1 or 0 for all")
    return value


def _stops(name: str, stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in stops):
        raise refused(name, f"takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(name: str, wanted: Mapping[str, float], vocab: int) -> tuple[tuple[int, float], ...]:
    if len(wanted) > MAX_BIASES:
        raise refused(name, f"names at most {MAX_BIASES} tokens")
    if not all(token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab for token in wanted):
        raise refused(name, f"names tokens by their numbers in the model's vocabulary, 0 to {vocab - 1}")
    if not all(-MAX_BIAS <= value <= MAX_BIAS for value in wanted.values()):
        raise refused(name, f"adds between -{MAX_BIAS} and {MAX_BIAS} to a token")
    return tuple({int(token): value for token, value in wanted.items()}.items())  # "5" and "05" are one token
