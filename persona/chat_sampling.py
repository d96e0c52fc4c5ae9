"""What a client may ask of sampling: the same bounds on every surface.

A value outside its bounds is refused by the name that it has on the wire, before anything is stored or queued.
"""

from collections.abc import Sequence

from persona.engine.protocol import Sampling
from persona.errors import RequestError

DEFAULT_TEMPERATURE = 0.7  # a small model wanders at OpenAI's 1.0
MAX_STOPS = 16
MAX_STOP_CHARS = 256
_SEED = 1 << 63


def sampling(
    temperature: float | None, top_p: float | None, seed: int | None, stop: str | Sequence[str] | None, place: str = ""
) -> Sampling:
    """The values as the engine takes them. `place` stands before their names on the wire, say "options."."""
    heat = DEFAULT_TEMPERATURE if temperature is None else _within(f"{place}temperature", temperature, 0, 2)
    nucleus = 1.0 if top_p is None else _within(f"{place}top_p", top_p, 0, 1)
    if nucleus == 0:  # the smallest nucleus is the likeliest token
        heat, nucleus = 0.0, 1.0
    if seed is not None and not -_SEED <= seed < _SEED:
        raise _refused(f"{place}seed", "does not fit into 64 bits")
    return Sampling(temperature=heat, top_p=nucleus, seed=seed, stop=_stops(f"{place}stop", stop))


def max_tokens(name: str, wanted: int | None, most: int) -> int | None:
    """None: as many as fit."""
    if wanted is not None and not 1 <= wanted <= most:
        raise _refused(name, f"lies between 1 and {most}")
    return wanted


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise _refused(name, f"lies between {low} and {high}")
    return value


def _stops(name: str, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in stops):
        raise _refused(name, f"takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters")
    return stops


def _refused(name: str, bounds: str) -> RequestError:
    return RequestError(f"{name} {bounds}.", code="unsupported_value", param=name)
