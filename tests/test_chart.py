"""The picture of a trial: well-formed, with everybody in it, whatever they are called."""

from xml.etree import ElementTree

import pytest

from persona import chart


def said(names: list[str], rounds: int = 3) -> dict[str, object]:
    curve = [
        {"tokens": 500.0 * (i + 1), "base": 4.0, "context": 3.5, "adapter": 3.4 - i / 10, "adapter_context": 3.1}
        for i in range(rounds)
    ]
    return {"users": [{"user": name, "gain": 0.1, "gain_interval": [0.05, 0.15], "curve": curve} for name in names]}


@pytest.mark.parametrize("rounds", [1, 3])
def test_it_is_svg_with_a_line_for_each_condition_and_a_bar_for_each_person(rounds: int) -> None:
    picture = ElementTree.fromstring(chart.svg(said(["ann", '<b>&"', "ö" * 40], rounds)))
    kinds = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert kinds.count("polyline") == 4
    assert kinds.count("rect") == 1 + 3
    assert '<b>&"' in [element.text for element in picture.iter()]


def test_nothing_is_drawn_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    people = said(["ann", "bob"])
    people["users"][1].update(gain=-0.2, gain_interval=[-0.4, 0.01])  # type: ignore[index]
    for element in ElementTree.fromstring(chart.svg(people)).iter():
        for name, limit in (("x", chart.WIDTH), ("y", chart.HEIGHT), ("cx", chart.WIDTH), ("cy", chart.HEIGHT)):
            if name in element.attrib:
                assert 0 <= float(element.attrib[name]) <= limit
