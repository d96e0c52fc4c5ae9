"""A trial as a picture: loss against length of history, and what each person gains. Plain SVG, no library."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN, TOP, GAP = 960, 440, 56, 98, 96
COLOURS = {
    "base": "#8a8f98",
    "context": "#2b6cb0",
    "prior": "#805ad5",
    "wrong_user": "#c53030",
    "adapter": "#dd6b20",
    "adapter_context": "#2f855a",
}
# Of what is measured at the end alone.
ENDS = ("#b7791f", "#2c7a7b", "#63b3ed", "#553c9a", "#97266d", "#718096", "#276749", "#b83280")
NAMES = {"wrong_user": "another's adapter", "adapter_context": "adapter + context", "stale": "version before"}
CAPTION = "Each point stands on other held-out messages: those that came next then."
_PANEL = (WIDTH - 2 * MARGIN - GAP) / 2


def svg(said: dict[str, Any]) -> str:
    """said: what `persona eval --json` prints."""
    parts = [*_curves(said["users"]), *_gains(said["users"])]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _curves(people: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Mean over people of the loss after each round, by own tokens learned from."""
    points = [_means([person["curve"][i] for person in people]) for i in range(len(people[0]["curve"]))]
    xs = [point["tokens"] for point in points]
    shown = {name: colour for name, colour in COLOURS.items() if all(name in point for point in points)}
    ends = _ends(people)
    ys = [*(point[name] for point in points for name in shown), *ends.values()]
    x_end, low, high = max(1.0, *xs) * 1.05, min(ys) - 0.1, max(ys) + 0.1
    yield _text(MARGIN, 24, "Loss per own token, by own tokens learned from", bold=True)
    yield from _axes(MARGIN, [0, x_end / 2, x_end], [low, (low + high) / 2, high], "{:.0f}", "{:.2f}")
    yield _text(MARGIN, HEIGHT - 16, CAPTION)
    for place, (name, colour) in enumerate(shown.items()):
        line = [(_x(MARGIN, p["tokens"], 0, x_end), _y(p[name], low, high)) for p in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in line)
        yield _legend(place, NAMES.get(name, name), colour)
    for place, (name, value) in enumerate(ends.items()):
        x, y, colour = _x(MARGIN, xs[-1], 0, x_end), _y(value, low, high), ENDS[place % len(ENDS)]
        yield f'<path d="M{x - 5:.1f} {y:.1f} l5 -5 l5 5 l-5 5 z" fill="white" stroke="{colour}" stroke-width="2"/>'
        yield _legend(len(shown) + place, f"◇ {NAMES.get(name, name.replace('_', ' '))}", colour)


def _ends(people: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean losses after the last round under what only that is measured under: each context, the version before, and
    base and versions as they are served."""
    measured = [person.get("conditions", {}) for person in people]
    means = _means(measured) if all(measured) else {}
    return {name: value for name, value in means.items() if _at_the_end(name)}


def _at_the_end(name: str) -> bool:
    return name == "stale" or name.startswith("context_") or name.endswith("_served")


def _legend(place: int, text: str, colour: str) -> str:
    column, row = place % 3, place // 3
    return _text(MARGIN + 8 + 135 * column, 38 + 13 * row, text, colour=colour)


def _gains(people: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Adapter and context over context alone: a bar a person, with the interval of the bootstrap."""
    left = MARGIN + _PANEL + GAP
    ends = [value for person in people for value in (*person["gain_interval"], person["gain"])]
    low, high = min(0.0, *ends) - 0.01, max(0.0, *ends) + 0.01
    yield _text(left, 24, "Gain of adapter + context over context alone", bold=True)
    yield from _axes(left, [], [low, 0.0, high], "{:.0f}", "{:.0%}")
    wide = _PANEL / len(people)
    for place, person in enumerate(people):
        middle = left + wide * (place + 0.5)
        top, zero = _y(person["gain"], low, high), _y(0.0, low, high)
        yield (
            f'<rect x="{middle - wide * 0.3:.1f}" y="{min(top, zero):.1f}" width="{wide * 0.6:.1f}"'
            f' height="{abs(zero - top):.1f}" fill="{COLOURS["adapter_context"]}" opacity="0.7"/>'
        )
        ends_at = [f"{_y(value, low, high):.1f}" for value in person["gain_interval"]]
        yield f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends_at[0]}" y2="{ends_at[1]}" stroke="#1a202c"/>'
        yield (
            f'<text x="{middle:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="end" fill="#1a202c"'
            f' transform="rotate(-35 {middle:.1f} {HEIGHT - MARGIN + 16})">{escape(person["user"][:14])}</text>'
        )


def _axes(left: float, xs: Sequence[float], ys: Sequence[float], x_form: str, y_form: str) -> Iterator[str]:
    bottom = HEIGHT - MARGIN
    yield f'<path d="M{left:.1f} {TOP} V{bottom} H{left + _PANEL:.1f}" fill="none" stroke="#1a202c"/>'
    for value in xs:
        yield _text(_x(left, value, 0, xs[-1]), bottom + 16, x_form.format(value), anchor="middle")
    for value in ys:
        height = _y(value, ys[0], ys[-1])
        yield _text(left - 6, height + 4, y_form.format(value), anchor="end")
        yield f'<line x1="{left:.1f}" x2="{left + _PANEL:.1f}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e2e8f0"/>'


def _text(x: float, y: float, text: str, *, colour: str = "#1a202c", anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _x(left: float, value: float, low: float, high: float) -> float:
    return left + (value - low) / (high - low) * _PANEL


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - MARGIN - TOP)


def _means(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of what is told of everybody."""
    common = [name for name in points[0] if all(name in point for point in points)]
    return {name: sum(point[name] for point in points) / len(points) for name in common}
