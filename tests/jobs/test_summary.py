"""What a trial says of measured people: means over people, paired intervals, and no more than was measured."""

import json

import numpy as np
import pytest

from jobs import summary
from jobs.trial import Result


def person(name: str, over: list[float], under: list[float], lengths: list[int] | None = None) -> Result:
    made = Result(name, 1000, lengths or [10] * len(over), reference={"base": 2.0, "adapter": 2.01})
    made.nats = {"base": [3.0 * n for n in made.lengths], "context": over, "adapter_context": under, "adapter": under}
    made.chosen = "context_recent_256"
    made.curve = [{"tokens": 1000, "base": 3.0, "context": 2.0, "adapter": 1.9, "adapter_context": 1.8}]
    return made


def test_a_gain_is_a_share_of_the_loss_and_its_mean_is_over_people() -> None:
    some = [person("ann", [20.0] * 30, [18.0] * 30), person("bob", [40.0] * 5, [20.0] * 5)]
    found = summary.compare(some, "context", "adapter_context")
    assert found is not None
    assert found.gain == pytest.approx((0.1 + 0.5) / 2)
    assert (found.better, found.people) == (1.0, 2)
    assert found.low < found.gain < found.high


def test_equal_people_with_equal_messages_have_no_width() -> None:
    found = summary.compare([person(str(i), [20.0] * 9, [19.0] * 9) for i in range(4)], "context", "adapter_context")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.05, 0.05))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """100 trials of 12 people whose true gain is 10 %: 95 % intervals miss it seldom, and are not idle."""
    random, hits, widths = np.random.default_rng(3), 0, []
    for _ in range(100):
        people = []
        for i in range(12):
            over = random.gamma(4, 8, 40)
            under = over * (1 - random.normal(0.1, 0.03)) + random.normal(0, 3, 40)
            people.append(person(str(i), over.tolist(), under.tolist()))
        found = summary.compare(people, "context", "adapter_context")
        assert found is not None
        hits += found.low <= 0.1 <= found.high
        widths.append(found.high - found.low)
    assert hits >= 88
    assert np.median(widths) < 0.08


def test_who_lacks_a_condition_does_not_count_and_nobody_is_nothing() -> None:
    some = [person("ann", [20.0] * 5, [18.0] * 5), person("bob", [20.0] * 5, [18.0] * 5)]
    some[0].nats["prior_context"] = [19.0] * 5
    found = summary.compare(some, "prior_context", "adapter_context")
    assert found is not None
    assert found.people == 1
    assert summary.compare(some, "wrong_user", "adapter") is None
    assert "adapter_over_wrong_user" not in summary.summary(some)
    assert "prior_context" not in summary.summary(some)["losses"]


def test_the_whole_is_json_and_names_drift_and_shares() -> None:
    some = [person("ann", [20.0] * 5, [18.0] * 5), person("bob", [20.0] * 5, [22.0] * 5)]
    some[0].recognised = {"author": 1.0}
    some[1].recognised = {"author": 0.5}
    said = json.loads(json.dumps({"summary": summary.summary(some), "users": [summary.as_dict(one) for one in some]}))
    assert said["summary"]["reference_drift"]["worst"] == pytest.approx(0.005)
    assert said["summary"]["recognised"]["author"] == 0.75
    assert said["summary"]["adapter_context_over_context"]["better"] == 0.5
    assert said["users"][0]["conditions"]["context"] == 2.0
    assert said["users"][0]["gain_interval"][0] <= said["users"][0]["gain"] <= said["users"][0]["gain_interval"][1]
    for name, one in said["users"][1]["gains"].items():
        assert one["low"] - 1e-9 <= one["gain"] <= one["high"] + 1e-9
        assert name in said["summary"]
    assert {"adapter_context_over_context", "adapter_over_base"} <= set(said["users"][1]["gains"])
