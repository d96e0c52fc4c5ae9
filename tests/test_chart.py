"""The picture of a trial: well-formed, with everybody in it, whatever they are called."""

from xml.etree import ElementTree

import pytest

from persona import chart


def said(names: list[str], rounds: int = 3, **more: float) -> dict[str, object]:
    point = {"base": 4.0, "context": 3.5, "adapter_context": 3.1, **more}
    curve = [{"tokens": 500.0 * (i + 1), "adapter": 3.4 - i / 10, **point} for i in range(rounds)]
    return {"users": [{"user": name, "gain": 0.1, "gain_interval": [0.05, 0.15], "curve": curve} for name in names]}


@pytest.mark.parametrize("rounds", [1, 3])
def test_it_is_svg_with_a_line_for_each_condition_and_a_bar_for_each_person(rounds: int) -> None:
    picture = ElementTree.fromstring(chart.svg(said(["ann", '<b>&"', "ö" * 40], rounds)))
    kinds = [element.tag.rpartition("}")[2] for element in picture.iter()]
    assert kinds.count("polyline") == 4
    assert kinds.count("rect") == 1 + 3
    assert '<b>&"' in [element.text for element in picture.iter()]


def texts(people: dict[str, object]) -> list[str | None]:
    return [element.text for element in ElementTree.fromstring(chart.svg(people)).iter()]


def test_prior_and_another_persons_adapter_have_lines_where_everybody_was_measured_under_them() -> None:
    with_both = said(["ann", "bob"], prior=3.45, wrong_user=5.5)
    assert chart.svg(with_both).count("<polyline") == 6
    assert {"base", "context", "prior", "another's adapter", "adapter", "adapter + context"} <= set(texts(with_both))
    with_both["users"][1]["curve"] = said(["bob"], prior=3.45)["users"][0]["curve"]  # type: ignore[index]
    assert chart.svg(with_both).count("<polyline") == 5
    assert "another's adapter" not in texts(with_both)


def test_what_is_measured_at_the_end_alone_has_a_mark() -> None:
    people = said(["ann", "bob"])
    conditions = {"base": 4.0, "stale": 3.4, "adapter_served": 3.0}
    conditions |= {"context_recent_256": 3.6, "context_found_1024": 3.5}
    for person in people["users"]:  # type: ignore[attr-defined]
        person["conditions"] = conditions
    marks = {"◇ version before", "◇ adapter served", "◇ context recent 256", "◇ context found 1024"}
    assert {text for text in texts(people) if str(text).startswith("◇")} == marks
    del people["users"][1]["conditions"]  # type: ignore[index]
    assert not any(str(text).startswith("◇") for text in texts(people))


def test_people_of_whom_nothing_was_kept_are_drawn() -> None:
    people = said(["ann"], rounds=1)
    people["users"][0]["curve"][0]["tokens"] = 0  # type: ignore[index]
    assert "0" in texts(people)


def test_it_says_that_points_stand_on_different_messages() -> None:
    assert any("other held-out messages" in str(text) for text in texts(said(["ann"])))


def test_nothing_is_drawn_outside() -> None:
    people = said(["ann", "bob"], prior=3.45, wrong_user=5.5)
    people["users"][1].update(gain=-0.2, gain_interval=[-0.4, 0.01])  # type: ignore[index]
    for element in ElementTree.fromstring(chart.svg(people)).iter():
        for name, limit in (("x", chart.WIDTH), ("y", chart.HEIGHT), ("cx", chart.WIDTH), ("cy", chart.HEIGHT)):
            if name in element.attrib:
                assert 0 <= float(element.attrib[name]) <= limit
