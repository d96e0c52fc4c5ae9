"""Replies that are held to a schema: whatever the model, what it says is JSON of that schema, row by row."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import adapters
import msgspec
import pytest
import torch
from models import Models
from plain import some_tokens
from workbench import Bench, grammars

from persona.engine import protocol, sampler, schema
from persona.engine.grammar import Grammars
from persona.engine.protocol import Piece, Sampling
from persona.engine.sampler import Sampler


class Address(msgspec.Struct, forbid_unknown_fields=True):
    street: Annotated[str, msgspec.Meta(max_length=8)]
    zip: Annotated[str, msgspec.Meta(pattern="^[0-9]{5}$")]


class Person(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=6)]
    age: Annotated[int, msgspec.Meta(ge=0, le=130)]
    kind: Literal["cat", "dog"]
    address: Address
    tags: Annotated[list[Literal["a", "b"]], msgspec.Meta(min_length=1, max_length=3)]
    boss: Annotated[str, msgspec.Meta(max_length=4)] | None = None


def schema_of(kind: Any) -> dict[str, Any]:
    """What msgspec says of a type, closed and with null told as OpenAI's clients tell it."""
    return msgspec.json.schema(kind)


PERSON = schema.grammar(schema_of(Person))
FLAG = schema.grammar({"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
                       "additionalProperties": False})  # fmt: skip
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "integer", "minimum": 0, "maximum": 9},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture
def bench(models: Models) -> Bench:
    return Bench(models)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_model_fills_a_nested_schema(bench: Bench, seed: int) -> None:
    job = bench.generate(some_tokens(9), count=300, temperature=1.5, seed=seed, grammar=PERSON)
    bench.finish()
    assert bench.end(job) == "stop"
    person = msgspec.json.decode(bench.text(job), type=Person)
    assert person.kind in ("cat", "dog")


def test_a_greedy_reply_is_held_to_it_too_and_ends_by_itself(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=300, grammar=PERSON)
    bench.finish()
    assert bench.end(job) == "stop"
    msgspec.json.decode(bench.text(job), type=Person)


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_may_refer_to_itself(bench: Bench, seed: int) -> None:
    job = bench.generate(some_tokens(9), count=400, temperature=1.0, seed=seed, grammar=schema.grammar(TREE))
    bench.finish()
    if bench.end(job) == "stop":
        assert set(json.loads(bench.text(job))) <= {"v", "kids"}
    else:
        assert bench.text(job).startswith("{")


def test_whole_and_unfinished_json_are_told_apart_by_the_finish(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=3, grammar=PERSON)
    bench.finish()
    assert bench.end(job) == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(bench.text(job))


def test_rows_of_several_schemas_and_none_stand_side_by_side(bench: Bench, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=1, number=1)
    free = bench.alone(some_tokens(9), None, 20)
    jobs = [
        bench.generate(some_tokens(9), count=20),
        bench.generate(some_tokens(9), ref, 300, temperature=1.0, seed=2, grammar=PERSON),
        bench.generate(some_tokens(9), None, 300, temperature=1.3, top_p=0.9, seed=3, grammar=FLAG, logprobs=3),
        bench.generate(some_tokens(9), ref, 300, frequency_penalty=1.0, logit_bias=((9, 5.0),), grammar=PERSON),
    ]
    bench.finish()
    assert bench.text(jobs[0]) == free
    for job in (jobs[1], jobs[3]):
        msgspec.json.decode(bench.text(job), type=Person)
    assert set(json.loads(bench.text(jobs[2]))) == {"on"}


def test_a_seeded_reply_is_the_same_beside_others(bench: Bench) -> None:
    wishes: dict[str, Any] = {"temperature": 1.2, "seed": 4, "grammar": PERSON}
    alone = bench.alone(some_tokens(9), None, 300, **wishes)
    jobs = [bench.generate(some_tokens(9), None, 300, **wishes)]
    jobs += [bench.generate(some_tokens(20 + n), None, 40, temperature=1.0, seed=n) for n in range(3)]
    bench.finish()
    assert bench.text(jobs[0]) == alone


def test_a_stop_string_ends_it_earlier(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=300, grammar=PERSON, stop=('"age"',))
    bench.finish()
    assert bench.end(job) == "stop"
    assert '"age"' not in bench.text(job)


def test_what_may_begin_a_stop_string_is_shown_when_the_json_ends(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=300, grammar=FLAG, stop=("}}",))
    bench.finish()
    assert bench.text(job).endswith("}")


def test_others_go_on_while_a_grammar_is_compiled(bench: Bench) -> None:
    """The thread that compiles is held up: steps go on, and the row comes in once it is ready."""
    gate, running = threading.Event(), bench.generate(some_tokens(9), count=40)
    held = bench.loop._compiling._grammars._thread.submit(lambda: gate.wait(30))
    waiting = bench.generate(some_tokens(9), count=60, grammar=FLAG)
    left = bench.generate(some_tokens(9), count=60, grammar=FLAG)
    assert not bench.loop.idle
    for _ in range(60):
        bench.work()
    assert bench.end(running) == "length"
    assert bench.end(waiting) is None
    bench.abort(left)
    assert bench.end(left) == "abort"
    gate.set()
    assert held.result(30)
    bench.finish()
    assert set(json.loads(bench.text(waiting))) == {"on"}


def test_who_waits_for_a_grammar_counts_as_waiting(models: Models) -> None:
    now = [0.0]
    bench = Bench(models, waiting=3, patience=5.0, clock=lambda: now[0])
    gate = threading.Event()
    held = bench.loop._compiling._grammars._thread.submit(lambda: gate.wait(30))
    jobs = [bench.generate(some_tokens(9), count=60, grammar=FLAG, user=user) for user in range(1, 6)]
    assert [bench.failure(job).kind for job in jobs[3:]] == ["Busy"] * 2
    assert bench.failure(bench.generate(some_tokens(9), user=9)).kind == "Busy"
    now[0] = 6.0
    bench.work()
    assert [bench.failure(job).kind for job in jobs[:3]] == ["Busy"] * 3
    gate.set()
    assert held.result(30)
    bench.finish()
    assert bench.alone(some_tokens(9))


@contextmanager
def _compiler_busy(bench: Bench) -> Iterator[None]:
    gate = threading.Event()
    held = bench.loop._compiling._grammars._thread.submit(lambda: gate.wait(30))
    try:
        yield
    finally:
        gate.set()
        assert held.result(30)


def test_a_room_full_of_one_users_schemas_has_room_for_others(models: Models) -> None:
    bench = Bench(models, waiting=3)
    with _compiler_busy(bench):
        crowd = [bench.generate(some_tokens(9), count=60, grammar=FLAG, user=1) for _ in range(3)]
        light = bench.generate(some_tokens(9), user=2)
        assert bench.failure(crowd[2]).kind == "Busy"
        bench.work()
        assert bench.answers[light]
    bench.finish()
    assert all(bench.text(job) for job in crowd[:2])


def test_who_is_dropped_while_a_grammar_is_compiled_leaves_nothing_behind(models: Models) -> None:
    bench, prompt = Bench(models), some_tokens(40)
    with _compiler_busy(bench):
        job = bench.generate(prompt, count=60, grammar=FLAG, user=1)
        bench.loop.handle(protocol.Drop(999, 1))
    bench.finish()
    assert bench.text(job)
    assert bench.health().cached_pages == 0


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(bench: Bench) -> None:
    good = bench.generate(some_tokens(9), count=5)
    bad = bench.generate(some_tokens(9), count=5, grammar=schema.grammar({"type": "strin"}))
    bench.finish()
    assert bench.failure(bad).kind == "RequestError"
    assert bench.end(good) == "length"


def test_a_tokenizer_that_is_not_known_serves_text_and_refuses_schemas(bench: Bench) -> None:
    bench.loop._compiling._grammars = Grammars("{}", bench.shape.vocab, frozenset())
    assert len(bench.alone(some_tokens(9))) > 0
    job = bench.generate(some_tokens(9), grammar=FLAG)
    bench.finish()
    assert "tokenizer" in bench.failure(job).message


def test_masks_are_the_same_alone_and_in_a_batch(bench: Bench) -> None:
    made = grammars(bench.prepared.folder, bench.shape.vocab)
    rows = torch.randn(3, bench.shape.vocab)
    samplers = [Sampler(Sampling(), (), made.compile(one).result()) for one in (PERSON, FLAG, PERSON)]
    changed = rows.clone()
    sampler.draw(changed, samplers, sampler.in_torch)
    assert torch.equal(changed[0].isinf(), changed[2].isinf())
    assert 0 < int(changed[0].isfinite().sum()) < bench.shape.vocab
    kept = changed.isfinite()
    assert torch.equal(changed[kept], rows[kept])


def test_what_is_told_of_tokens_is_before_the_grammar(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=300, grammar=FLAG, logprobs=1)
    bench.finish()
    told = [one for answer in bench.answers[job] if isinstance(answer, Piece) for one in answer.chunk.logprobs]
    assert told[0].token != told[0].top[0][0]
    assert told[0].logprob < told[0].top[0][1]


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ({"not": {"type": "string"}}, "not supported: not"),
        ({"type": "object", "unevaluatedProperties": False}, "not supported: unevaluatedProperties"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "not supported: if, then"),
        ({"type": "string", "pattern": "^(?=a).*$"}, "look-around"),
        ({"type": "string", "pattern": "("}, "regular expression"),
        ({"type": "string", "format": "colour of ann"}, "format"),
        ({"type": "strin"}, "type is not one"),
        ({"$ref": "http://example.com/s"}, "another document"),
        ({"$ref": "#/$defs/nowhere"}, "leads nowhere"),
        ({"$ref": "#"}, "nothing satisfies it"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "nothing satisfies it"),
        ({"type": "object", "properties": 5}, "wrong type"),
        (
            {"oneOf": [{"type": "object", "properties": {p: {"type": "string"}}} for p in "ab"]},
            "oneOf is followed only",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_followed_says_why_and_does_not_quote(wanted: dict[str, Any], word: str) -> None:
    problem = schema.problem(schema.grammar(wanted))
    assert word in problem
    assert "ann" not in problem


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"type": "object"},
        schema_of(Person),
        TREE,
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "string", "format": "date-time"},
        {"enum": ["a", 2, None]},
        {"const": {"a": [1]}},
        {"type": ["string", "null"], "title": "x", "description": "y", "default": None, "x-unknown": 1},
        {"type": "object", "x-guidance": {"lenient": True, "whitespace_pattern": "("}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_be_followed_has_no_problem(wanted: dict[str, Any]) -> None:
    assert schema.problem(schema.grammar(wanted)) == ""


def test_spaces_between_parts_have_an_end(bench: Bench) -> None:
    made = grammars(bench.prepared.folder, bench.shape.vocab)
    text = bench.loop._text
    for spaces, taken in ((16, True), (17, False)):
        grammar = made.compile(FLAG).result()
        for token in text.encode("{" + " " * spaces + '"on"'):
            grammar.took(token)
        assert grammar.lost is not taken


def test_threat_32_a_drop_forgets_what_was_compiled(models: Models) -> None:
    bench = Bench(models)
    kept = bench.loop._compiling._grammars._kept
    job = bench.generate(some_tokens(5), count=3, grammar=FLAG)
    bench.finish()
    assert bench.end(job)
    assert kept
    bench.ask(lambda job: protocol.Drop(job, 1))
    bench.loop._compiling._grammars._thread.submit(lambda: None).result()
    assert not kept
