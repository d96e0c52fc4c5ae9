"""What a measurement says: percentiles of values that occurred, shares of users, kinds of errors."""

from typing import Any

import pytest

from persona.cli_bench_client import Measured, Outcome
from persona.cli_bench_report import comparison, line, percentiles, show
from persona.workload import Request


def outcome(user: int, *pieces: float, failure: str = "", refused: bool = False, start: float = 0.0) -> Outcome:
    made = Outcome(Request(user, 10, len(pieces), 1), start, list(pieces), failure=failure, refused=refused)
    made.tokens, made.prompt_tokens, made.end = len(pieces), 10, pieces[-1] + 0.5 if pieces else 1.0
    return made


def test_percentiles_are_values_that_occurred() -> None:
    found = percentiles([i / 1000 for i in range(1, 101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert percentiles([0.25]) == {"p50": 250.0, "p90": 250.0, "p95": 250.0, "p99": 250.0, "max": 250.0}
    assert percentiles([]) is None


def test_throughput_counts_replies_that_ended_as_asked_and_their_tokens() -> None:
    good = [outcome(1, 0.5, 1.0, 1.5), outcome(2, 1.0, 3.5)]
    bad = [outcome(1, 0.1, failure="broken_off"), outcome(3, failure="busy", refused=True)]
    told = line(Measured([*good, *bad], sent=5, seconds=4.0), slo=6.0)
    assert (told["sent"], told["answered"], told["refused"], told["unfinished"]) == (5, 2, 1, 1)
    assert told["errors"] == {"broken_off": 1}
    assert (told["requests_per_s"], told["tokens_per_s"]) == (0.5, 1.25)
    assert (told["prompt_tokens"], told["reply_tokens"], told["ended_early"]) == (20, 5, True)


def test_times_count_from_when_a_request_was_due() -> None:
    told = line(Measured([outcome(1, 2.5, 2.75, 3.5, start=2.0)], 1, 0.0, 4.0, complete=True), slo=6.0)
    assert told["first_token_ms"]["max"] == 500.0
    assert (told["between_tokens_ms"]["p50"], told["between_tokens_ms"]["max"]) == (250.0, 750.0)
    assert told["per_token_ms"]["max"] == 500.0
    assert told["total_ms"]["max"] == 2000.0
    assert told["ended_early"] is False


def test_attainment_counts_refused_and_failed_requests_as_missed_and_names_the_worst_users_share() -> None:
    outcomes = [
        outcome(1, 0.5),
        outcome(1, 0.9),
        outcome(2, 0.9),
        outcome(2, 1.1),
        outcome(2, failure="busy", refused=True),
        outcome(3, 0.9),
    ]
    slo = line(Measured(outcomes, 6, 0.0, 2.0), slo=1.0)["slo"]
    assert slo == {"seconds": 1.0, "attained": 0.6667, "worst_user": 0.3333, "worst_user_requests": 3}


def test_light_users_are_told_of_apart_from_the_one_who_floods() -> None:
    told = line(Measured([outcome(0, 0.2), outcome(9, 5.0), outcome(9, 6.0)], 3, 0.0, 7.0), slo=1.0, flooder=9)
    assert told["light_users"]["first_token_ms"]["p95"] == 200.0
    assert (told["light_users"]["sent"], told["flooding_user"]["sent"]) == (1, 2)
    assert told["light_users"]["slo"]["attained"] == 1.0


def test_users_with_sound_adapters_are_told_of_apart() -> None:
    outcomes = [outcome(0, failure="adapter_error"), outcome(1, 0.2), outcome(2, failure="connection")]
    told = line(Measured(outcomes, 3, 0.0, 1.0), slo=1.0, corrupt=[0])
    assert told["corrupt_users"]["errors"] == {"adapter_error": 1}
    assert told["sound_users"]["errors"] == {"connection": 1}


def test_what_the_engine_counts_is_what_it_counted_during_the_run() -> None:
    before = {"steps": 10.0, "loads": 3.0, "loaded_bytes": 300.0, "memory": 5.0}
    after = {"steps": 25.0, "loads": 5.0, "loaded_bytes": 500.0, "memory": 7.0, "resident": 4.0}
    told = line(Measured([outcome(1, 0.1)], 1, 0.0, 1.0, before, after), slo=1.0)
    assert told["engine"] == {
        "steps": 15,
        "adapter_loads": 2,
        "adapter_loaded_bytes": 200,
        "adapters": 4,
        "memory": 7,
    }
    assert line(Measured([outcome(1, 0.1)], 1, 0.0, 1.0), slo=1.0)["engine"] is None


def side(*rates: float, tokens: int, p95: float) -> list[dict[str, Any]]:
    times = {"first_token_ms": {"p95": p95}}
    return [{"requests_per_s": rate, "tokens_per_s": tokens * rate, **times} for rate in rates]


def test_sides_are_compared_round_by_round() -> None:
    ours, theirs = side(9.0, 5.0, 4.0, tokens=8, p95=30.0), side(10.0, 10.0, 5.0, tokens=10, p95=20.0)
    assert comparison(ours, theirs) == {
        "ratio_requests_per_s": 0.8,
        "ratio_tokens_per_s": 0.64,
        "ratio_first_token_p95": 1.5,
    }
    assert set(comparison(ours, []).values()) == {None}
    assert comparison(ours, side(0.0, tokens=1, p95=1.0))["ratio_requests_per_s"] is None


def test_of_a_flood_the_light_users_are_compared() -> None:
    flooded = [{**one, "light_users": {"first_token_ms": {"p95": 25.0}}} for one in side(9.0, tokens=8, p95=900.0)]
    assert comparison(flooded, side(9.0, tokens=8, p95=20.0))["ratio_first_token_p95"] == 1.25


def test_the_table_explains_each_figure_and_lists_errors(capsys: pytest.CaptureFixture[str]) -> None:
    told = line(Measured([outcome(1, 0.1, 0.2), outcome(2, failure="busy")], 2, 0.0, 1.0), slo=1.0)
    show({"2 users": [told, told], "base": [told]}, slo=1.0)
    shown = capsys.readouterr().out
    assert "first token p50" in shown
    assert "2 users: errors were 2 × busy." in shown
    assert "base: errors were 1 × busy." in shown
    assert "light users" not in shown
