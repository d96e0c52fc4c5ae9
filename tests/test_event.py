"""From bytes to an event, or to the reason why they are none."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persona import event
from persona.domain import Line
from persona.event import (
    MAX_CONTEXT,
    MAX_ID,
    MAX_KEY,
    MAX_SEQ,
    MAX_VALUE,
    Event,
    Happening,
    Known,
    Rating,
    Reason,
    Refused,
    Words,
)

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
LIMIT = 65_536
CANARY = "xylophonquartz"
KINDS = ["message", "feedback", "fact", "state", "temperature"]


def read(payload: Any, kind: str = "temperature", *, now: datetime = NOW, limit: int = LIMIT) -> Event:
    """`payload`: bytes, or what becomes JSON."""
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return event.read("ann", kind, content, now, limit)


def refusal(payload: Any, kind: str = "temperature", **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read(payload, kind, **options)
    assert caught.value.detail.endswith(".")
    return caught.value


# What it says


def test_a_message_is_text_with_what_others_said_before() -> None:
    assert read("hi", "message").body == Words("hi")
    lines = [{"author": "bob", "text": "hello?"}, {"author": "eve", "text": ""}]
    expected = Words("hi", (Line("bob", "hello?"), Line("eve", "")))
    assert read({"text": "hi", "context": lines}, "message").body == expected


def test_of_a_long_context_the_newest_lines_are_kept() -> None:
    lines = [{"author": "bob", "text": str(number)} for number in range(MAX_CONTEXT + 5)]
    body = read({"text": "hi", "context": lines}, "message").body
    assert isinstance(body, Words)
    assert [line.text for line in body.context] == [str(number) for number in range(5, MAX_CONTEXT + 5)]


def test_feedback_rates_or_corrects_a_turn() -> None:
    assert read({"turn": 7, "rating": -1}, "feedback").body == Rating(7, -1, None)
    assert read({"turn": 7, "correction": "Hey."}, "feedback").body == Rating(7, None, "Hey.")


@pytest.mark.parametrize("kind", ["fact", "state"])
@pytest.mark.parametrize(
    ("value", "text"),
    [("on", "on"), (" on ", "on"), (True, "true"), (0, "0"), (-1.5, "-1.5"), ([1], "[1]"), ({}, "{}"), ("", None)],
)
def test_a_fact_has_a_key_and_a_value_of_any_kind(kind: str, value: Any, text: str | None) -> None:
    assert read({"key": " lamp ", "value": value}, kind).body == Known("lamp", text)


def test_no_value_at_all_takes_a_fact_back_and_is_not_the_same_as_leaving_it_out() -> None:
    assert read({"key": "lamp", "value": None}, "fact").body == Known("lamp", None)
    assert refusal({"key": "lamp"}, "fact").reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"text": "The bell rang."}, "The bell rang."),
        ({"text": "The bell rang.", "id": 1, "ts": 1_770_000_000, "seq": 3, "source": "door"}, "The bell rang."),
        ({"value": 21.5, "unit": "°C", "user": "ann"}, '{"value":21.5,"unit":"°C"}'),
        ("plain", "plain"),
        (21.5, "21.5"),
        (None, "null"),
        ([1, {"id": 2}], '[1,{"id":2}]'),
        ({}, "{}"),
        ({"text": ""}, '""'),
        ({"text": 5}, "5"),
    ],
)
def test_any_other_json_is_told_without_what_is_said_about_every_event(payload: Any, text: str) -> None:
    assert read(payload).body == Happening(text)


# Its name


def test_an_id_names_an_event_within_its_kind_and_source() -> None:
    one = read({"id": "1", "text": "a"}, "message")
    assert read({"id": "1", "text": "b", "ts": 1_770_000_000, "seq": 9}, "message").name == one.name
    assert read({"id": 1, "text": "a"}, "message").name == one.name
    others = [read({"id": "2", "text": "a"}, "message"), read({"id": "1", "text": "a"}, "note")]
    others.append(read({"id": "1", "text": "a", "source": "phone"}, "message"))
    assert len({one.name, *(other.name for other in others)}) == 4


def test_without_an_id_time_and_content_name_it_and_without_both_nothing_does() -> None:
    one = read({"ts": 1_770_000_000, "v": 1})
    assert one.name == read({"ts": 1_770_000_000, "v": 1}).name
    assert one.name != read({"ts": 1_770_000_000, "v": 2}).name
    assert one.name != read({"ts": 1_770_000_001, "v": 1}).name
    assert read({"v": 1}).name is None
    assert read({"v": 1, "seq": 4}).name is None


def test_an_id_cannot_pretend_to_be_a_time_or_another_source() -> None:
    timed = read({"ts": 1_770_000_000})
    assert timed.name is not None
    for sly in ("ts\0" + timed.name.decode().rpartition("\0")[2], "a\0b"):
        assert refusal({"id": sly}).reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize("wrong", ["", "x" * (MAX_ID + 1), "a\nb", 10**MAX_ID, 1.5, True, [1], {"a": 1}])
def test_an_impossible_id_is_refused(wrong: Any) -> None:
    assert refusal({"id": wrong}).reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize("right", ["x", "x" * MAX_ID, "é", 0, -1, 10 ** (MAX_ID - 1)])
def test_a_possible_id_is_taken(right: Any) -> None:
    assert read({"id": right}).name is not None


# Its time


@pytest.mark.parametrize(
    ("told", "moment"),
    [
        (1_770_000_000, datetime(2026, 2, 2, 2, 40, tzinfo=UTC)),
        (1_770_000_000.5, datetime(2026, 2, 2, 2, 40, 0, 500_000, tzinfo=UTC)),
        (1_770_000_000_000, datetime(2026, 2, 2, 2, 40, tzinfo=UTC)),  # milliseconds
        ("2026-02-02T03:40:00+01:00", datetime(2026, 2, 2, 2, 40, tzinfo=UTC)),
        ("2026-02-02T02:40:00Z", datetime(2026, 2, 2, 2, 40, tzinfo=UTC)),
        ("2026-02-02 02:40", datetime(2026, 2, 2, 2, 40, tzinfo=UTC)),  # without a zone: UTC
        ("2026-02-02", datetime(2026, 2, 2, tzinfo=UTC)),
        (None, NOW),
    ],
)
def test_a_time_is_iso_8601_or_seconds_or_milliseconds(told: Any, moment: datetime) -> None:
    assert read({"ts": told}).ts == moment


@pytest.mark.parametrize(
    "told",
    [
        (NOW + timedelta(seconds=1)).isoformat(),
        "9999-12-31T23:59:59Z",
        int(NOW.timestamp()) + 86_400,
        253_402_300_800,  # as seconds the year 10000: read as milliseconds
        0,
        -1,
        -62_135_596_800,
        "1970-01-01",
        "1999-12-31T23:59:59Z",
    ],
)
def test_threat_25_a_clock_that_is_ahead_or_was_never_set_is_not_believed(told: Any) -> None:
    found = read({"ts": told}).ts
    assert found == NOW or found == datetime.fromtimestamp(253_402_300.8, UTC)  # the milliseconds


def test_threat_25_the_limits_of_belief_are_exact() -> None:
    assert read({"ts": NOW.isoformat()}).ts == NOW
    assert read({"ts": "2000-01-01T00:00:00Z"}).ts == datetime(2000, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "yesterday", "+10000-01-01", "10000-01-01", "2026-02-30", "\0", "0001-01-01T00:00:00+14:00"),
        *(1e300, -1e300, 10**400, 1_770_000_000_000_000, True, [], {}),
    ],
)
def test_threat_25_a_time_that_is_none_is_refused(wrong: Any) -> None:
    assert refusal({"ts": wrong}).reason is Reason.BAD_PAYLOAD


# Its source and number


@pytest.mark.parametrize("seq", [0, 1, MAX_SEQ])
def test_a_sequence_number_counts_from_nought(seq: int) -> None:
    assert read({"seq": seq}).seq == seq


@pytest.mark.parametrize("wrong", [-1, MAX_SEQ + 1, 10**30, True, False, "1", 1.0, 1.5, [1]])
def test_an_impossible_sequence_number_is_refused(wrong: Any) -> None:
    assert refusal({"seq": wrong}).reason is Reason.BAD_PAYLOAD


def test_a_source_is_a_plain_word() -> None:
    assert read({"source": "zigbee/0x00:15.8d_a-b"}).source == "zigbee/0x00:15.8d_a-b"
    assert read({"source": ""}).source == read({}).source == ""
    for wrong in ("a b", "a\nb", '"', "é", "x" * 65, "/a", 5, ["a"]):
        assert refusal({"source": wrong}).reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize("kind", ["a", "0", "door.front_1-x", "k" * 64])
def test_a_kind_is_a_plain_word(kind: str) -> None:
    assert read({}, kind).kind == kind


@pytest.mark.parametrize("kind", ["", "A", "a/b", "a b", "é", ".a", "k" * 65, "a\n", "message\0", "#"])
def test_a_kind_that_cannot_be_is_a_bad_topic(kind: str) -> None:
    assert refusal({}, kind).reason is Reason.BAD_TOPIC


# Whose it is


def test_threat_22_a_payload_that_names_another_user_is_forged() -> None:
    for other in ("bob", "Ann", "ann ", ""):
        assert refusal({"user": other, "text": "hi"}, "message").reason is Reason.FORGED_USER
    assert read({"user": "ann", "text": "hi"}, "message").body == Words("hi")
    assert read({"user": {"id": 5}}).body == Happening("{}")  # no name at all: some device's own word


# What is refused


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", Reason.BAD_JSON),
        (b" \n", Reason.BAD_JSON),
        (b"\xef\xbb\xbf", Reason.BAD_JSON),
        (b"ON", Reason.BAD_JSON),
        (b"{", Reason.BAD_JSON),
        (b"{} {}", Reason.BAD_JSON),
        (b"NaN", Reason.BAD_JSON),
        (b'{"a":Infinity}', Reason.BAD_JSON),
        (b"1e400", Reason.BAD_JSON),
        (b"9" * 5000, Reason.BAD_JSON),
        (b'{"a":' + b"9" * 5000 + b"}", Reason.BAD_JSON),
        (b"[" * 60_000, Reason.BAD_JSON),
        (b"[" * 30_000 + b"]" * 30_000, Reason.BAD_JSON),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, Reason.BAD_JSON),
        (b'"\\ud800"', Reason.BAD_JSON),
        (b'"\xed\xa0\x80"', Reason.BAD_ENCODING),
        (b"\xff", Reason.BAD_ENCODING),
        ('{"a":1}'.encode("utf-16"), Reason.BAD_ENCODING),
        ('{"a":1}'.encode("utf-16-le"), Reason.BAD_JSON),
        ('{"a":"é"}'.encode("latin-1"), Reason.BAD_ENCODING),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_json_in_utf_8_is_refused_for_every_kind(kind: str, payload: bytes, reason: Reason) -> None:
    assert refusal(payload, kind).reason is reason


def test_a_byte_order_mark_is_no_reason_to_refuse() -> None:
    assert read(b'\xef\xbb\xbf{"text":"hi"}', "message").body == Words("hi")


def test_a_payload_may_have_as_many_bytes_as_the_limit_and_not_one_more() -> None:
    assert read(b'"' + b"x" * 254 + b'"', limit=256)
    assert refusal(b'"' + b"x" * 255 + b'"', limit=256).reason is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("message", {}),
        ("message", {"text": ""}),
        ("message", {"text": " \n"}),
        ("message", {"text": 5}),
        ("message", ["hi"]),
        ("message", None),
        ("message", {"text": "hi", "context": "hello"}),
        ("message", {"text": "hi", "context": [{"author": "bob"}]}),
        ("message", {"text": "hi", "context": [{"author": "bob", "text": 5}]}),
        ("feedback", {"rating": 1}),
        ("feedback", {"turn": 7}),
        ("feedback", {"turn": 7, "rating": None, "correction": None}),
        ("feedback", {"turn": 7, "rating": 2}),
        ("feedback", {"turn": 7, "rating": True}),
        ("feedback", {"turn": True, "rating": 1}),
        ("feedback", {"turn": "7", "rating": 1}),
        ("feedback", {"turn": 0, "rating": 1}),
        ("feedback", {"turn": -7, "rating": 1}),
        ("feedback", {"turn": 10**30, "rating": 1}),  # the database counts no further than 2^63
        ("feedback", {"turn": MAX_SEQ + 1, "rating": 1}),
        ("feedback", "good"),
        ("fact", {"key": "", "value": 1}),
        ("fact", {"key": " ", "value": 1}),
        ("fact", {"key": "x" * (MAX_KEY + 1), "value": 1}),
        ("fact", {"key": "a\nb", "value": 1}),
        ("fact", {"key": "a\u2028b", "value": 1}),
        ("fact", {"key": 5, "value": 1}),
        ("fact", {"value": 1}),
        ("fact", {"key": "k", "value": "x" * (MAX_VALUE + 1)}),
        ("fact", {"key": "k", "value": ["x" * MAX_VALUE]}),
        ("fact", ["key", "value"]),
        ("state", 21.5),
    ],
)
def test_json_without_what_its_kind_needs_is_refused(kind: str, payload: Any) -> None:
    assert refusal(payload, kind).reason is Reason.BAD_PAYLOAD


def test_values_and_keys_may_be_as_long_as_their_limits() -> None:
    assert read({"key": "k" * MAX_KEY, "value": "v" * MAX_VALUE}, "fact").body == Known("k" * MAX_KEY, "v" * MAX_VALUE)


# Whatever arrives

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["id", "ts", "seq", "source", "user", "text", "context", "turn", "rating", "correction", "key", "value"]
NUMBERS = st.sampled_from([0, -1, 1 << 53, 1 << 63, 1 << 64, 10**400, 1e308, 5e-324, 253_402_300_800, 99_999_999_999])
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON | NUMBERS, max_size=7)


def survives(kind: str, payload: bytes) -> Event | Refused:
    try:
        found = event.read("ann", kind, payload, NOW, LIMIT)
    except Refused as refused:
        return refused
    assert found.ts <= NOW
    assert found.ts.tzinfo is UTC
    return found


@given(st.sampled_from(KINDS), st.binary(max_size=200))
@example("message", b'{"text":"\xf0\x9f\x98"}')
def test_any_bytes_are_an_event_or_refused(kind: str, payload: bytes) -> None:
    survives(kind, payload)


@given(st.sampled_from(KINDS), JSON | OBJECTS)
def test_any_json_is_an_event_or_refused(kind: str, value: Any) -> None:
    survives(kind, json.dumps(value).encode())


@given(st.text(max_size=80))
def test_any_kind_is_an_event_or_refused(kind: str) -> None:
    survives(kind, b'{"text":"hi"}')


SECRETS = [
    CANARY,
    {CANARY: CANARY},
    [CANARY],
    {"text": CANARY, "context": [{CANARY: 1}]},
    {"text": {CANARY: 1}},
    {"text": "a", "context": [{"author": CANARY, "text": {CANARY: CANARY}}]},
    {"id": [CANARY]},
    {"id": CANARY * 20},
    {"ts": CANARY},
    {"seq": CANARY},
    {"source": CANARY + " "},
    {"user": CANARY},
    {"turn": CANARY},
    {"turn": 1, "rating": CANARY},
    {"turn": 1, "correction": [CANARY]},
    {"key": CANARY * 20, "value": 1},
    {"key": CANARY + "\n", "value": 1},
    {"key": "k", "value": CANARY * 200},
]


@pytest.mark.parametrize("kind", [*KINDS, CANARY.upper()])
@pytest.mark.parametrize("tail", [b"", b"}", b"\xff", b'"\\ud800"'], ids=["whole", "broken", "encoding", "surrogate"])
def test_threat_28_no_refusal_quotes_what_was_sent(kind: str, tail: bytes) -> None:
    for secret in SECRETS:
        outcome = survives(kind, json.dumps(secret).encode() + tail)
        if isinstance(outcome, Refused):
            assert CANARY not in f"{outcome!r} {outcome} {outcome.detail} {outcome.__cause__}".lower()
            assert outcome.__suppress_context__ or outcome.__context__ is None
