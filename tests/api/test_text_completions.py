"""POST /v1/completions with OpenAI's client: raw text goes on, in every form that a prompt has."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import adapters
import openai
import pytest
import torch
from live import Live, Start
from models import Models
from plain import logits

from persona.engine.protocol import GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import EngineDown

CLOSE = 0.05  # batched products round differently in bf16


def heard(request: GenerateRequest) -> str:
    """An engine that repeats what it read."""
    return f" after {bytes(request.tokens).decode()}"


async def test_a_text_goes_on_as_it_stands(start: Start) -> None:
    live = await start(ScriptedEngine(heard))
    answer = await (await live.openai()).completions.create(model="persona", prompt="Once upon")
    assert (answer.object, answer.model) == ("text_completion", "persona")
    assert answer.choices[0].text == " after Once upon"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert bytes(live.engine.requests[-1].tokens) == b"Once upon"  # no template, no system text, no history
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 4)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a", ["a"]),
        (["a", "b c"], ["a", "b c"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
async def test_a_prompt_is_text_texts_or_tokens(start: Start, prompt: Any, texts: list[str]) -> None:
    live = await start(ScriptedEngine(heard))
    answer = await (await live.openai()).completions.create(model="base", prompt=prompt)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (place, f" after {text}") for place, text in enumerate(texts)
    ]


async def test_choices_come_prompt_by_prompt_and_seeds_do_not_depend_on_the_place(start: Start) -> None:
    live = await start(ScriptedEngine(heard))
    client = await live.openai()
    answer = await client.completions.create(model="base", prompt=["a", "b"], n=3, seed=5, echo=True)
    assert [choice.text[0] for choice in answer.choices] == list("aaabbb")
    assert sorted((bytes(r.tokens), r.sampling.seed) for r in live.engine.requests) == [
        (prompt, seed) for prompt in (b"a", b"b") for seed in (5, 6, 7)
    ]


async def test_a_stream_tells_every_choice_apart(start: Start) -> None:
    live = await start(ScriptedEngine(heard, delay=0.005))
    client = await live.openai()
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    said: dict[int, str] = {}
    ended: dict[int, str] = {}
    async for chunk in await client.completions.create(model="base", prompt=["a", "b"], n=2, echo=True, **options):
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
    assert said == {0: "a after a", 1: "a after a", 2: "b after b", 3: "b after b"}
    assert set(ended) == {0, 1, 2, 3}
    assert chunk.usage is not None
    assert chunk.usage.prompt_tokens == 2


async def test_the_synchronous_client_works_too(live: Live) -> None:
    key = await live.key()

    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
            whole = client.completions.create(model="persona", prompt="x").choices[0].text
            stream = client.completions.create(model="persona", prompt="x", stream=True)
            return whole, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(talk) == ("Hello.", "Hello.")


@pytest.mark.parametrize("model", ["persona", "me", "base"])
async def test_nothing_of_it_is_history(live: Live, model: str) -> None:
    client = await live.openai()
    raw = await client.completions.with_raw_response.create(model=model, prompt="I live in Rome.")
    assert raw.headers["x-persona-recorded"] == "false"
    assert "x-persona-turn" not in raw.headers
    assert await live.history() == []
    # … and nothing that is history stands in it.
    await live.say("I live in Paris.")
    await client.completions.create(model=model, prompt="Where?")
    assert bytes(live.engine.requests[-1].tokens) == b"Where?"


async def test_sixteen_tokens_are_the_default_and_more_are_asked_for(start: Start) -> None:
    live = await start(ScriptedEngine("x " * 40))
    client = await live.openai()
    short = await client.completions.create(model="base", prompt="a")
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 16
    longer = await client.completions.create(model="base", prompt="a", max_tokens=30, stop="y", temperature=0)
    assert longer.usage is not None
    assert longer.usage.completion_tokens == 30
    assert live.engine.requests[-1].sampling.stop == ("y",)


async def test_an_echo_with_logprobs_scores_the_prompt(start: Start) -> None:
    live = await start(ScriptedEngine("!", score=lambda request: [-0.5 * target for target in request.targets]))
    client = await live.openai()
    answer = await client.completions.create(model="base", prompt="héy", echo=True, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert answer.choices[0].text == "héy!"
    assert told.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "y", "!"]
    assert told.token_logprobs == [None, -0.5, -1.0, -1.5, -1.0]
    assert told.text_offset == [0, 1, 1, 2, 3]
    assert told.top_logprobs is not None
    assert told.top_logprobs[0] is None
    assert told.top_logprobs[3] == {"y": -1.5, "z": -2.5}


async def test_a_prompt_alone_can_be_scored(live: Live) -> None:
    answer = await (await live.openai()).completions.create(
        model="base", prompt=["abc", "de"], echo=True, logprobs=0, max_tokens=0
    )
    assert [choice.text for choice in answer.choices] == ["abc", "de"]
    assert [len(choice.logprobs.tokens) for choice in answer.choices if choice.logprobs] == [3, 2]  # type: ignore[arg-type]
    assert live.engine.requests == []
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "param", "word"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "text, a list"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "text, a list"),
        ({"prompt": 5}, "prompt", "text, a list"),
        ({"prompt": ["a", 5]}, "prompt", "text, a list"),
        ({"prompt": [True]}, "prompt", "text, a list"),
        ({"prompt": [1.5]}, "prompt", "text, a list"),
        ({"prompt": {"text": "a"}}, "prompt", "text, a list"),
        ({"prompt": [-1]}, "prompt", "numbers in the model"),
        ({"prompt": [[5], [10**6]]}, "prompt", "numbers in the model"),
        ({"suffix": "the end"}, "suffix", "cannot fill a gap"),
        ({"best_of": 5}, "best_of", "choose among them by logprobs"),
        ({"best_of": 1, "n": 2}, "best_of", "beyond n"),
        ({"n": 17}, "n", "between 1 and 16"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "Expected int"),
        ({"echo": "yes"}, "echo", "Expected bool"),
        ({"max_tokens": 0}, "max_tokens", "between 1"),
        ({"max_tokens": 10**6}, "max_tokens", "between 1"),
        ({"temperature": 3}, "temperature", "between 0 and 2"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "numbers in the model"),
        ({"response_format": {"type": "json_object"}}, "response_format", "/v1/chat/completions"),
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused_by_name(
    live: Live, change: dict[str, Any], param: str, word: str
) -> None:
    body = {"model": "base", "prompt": "a", **change}
    answer = await live.call("POST", "/v1/completions", json=body, status=400)
    assert answer["error"]["param"] == param
    assert word in answer["error"]["message"]
    assert live.engine.requests == []


@pytest.mark.parametrize(
    "change", [{"suffix": None}, {"suffix": ""}, {"best_of": 2, "n": 2}, {"user": "x"}, {"n": None}]
)
async def test_what_changes_nothing_is_taken(live: Live, change: dict[str, Any]) -> None:
    await live.call("POST", "/v1/completions", json={"model": "base", "prompt": "a", **change})


@pytest.mark.parametrize("change", [{"prompt": ["a"] * 129}, {"prompt": ["a"] * 20, "n": 7}])
async def test_too_many_prompts_are_refused(live: Live, change: dict[str, Any]) -> None:
    answer = await live.call("POST", "/v1/completions", json={"model": "base", **change}, status=413)
    assert answer["error"]["param"] == "prompt"
    assert live.engine.requests == []


async def test_a_prompt_that_does_not_fit_is_refused(start: Start) -> None:
    live = await start(engine={"context": 256})
    body = {"model": "base", "prompt": ["a", "x" * 250], "max_tokens": 10}
    answer = await live.call("POST", "/v1/completions", json=body, status=400)
    assert answer["error"]["code"] == "context_length_exceeded"
    assert live.engine.requests == []


async def test_a_model_of_somebody_else_does_not_exist(live: Live) -> None:
    await live.publish("bob")
    body = {"model": "persona@1", "prompt": "a"}
    await live.call("POST", "/v1/completions", json=body, status=404)
    await live.call("POST", "/v1/completions", json=body, user="bob")


async def test_the_callers_version_goes_on_with_the_text(live: Live) -> None:
    number = await live.publish()
    answer = await (await live.openai()).completions.create(model="persona", prompt="a", echo=True, logprobs=0)
    assert answer.system_fingerprint == f"fp_scripted_{number}"
    for asked in (live.engine.requests[-1], live.engine.scored[-1]):
        assert asked.adapter is not None
        assert asked.adapter.number == number


async def test_a_broken_version_gives_way_to_the_one_before(live: Live) -> None:
    await live.publish(content=b"good")
    await live.publish(content=b"later")
    user = await live.user()
    version = await live.services.adapters.active(user.id)
    assert version is not None
    Path(version.path, "adapter.safetensors").write_bytes(b"spoiled")
    answer = await (await live.openai()).completions.create(model="persona", prompt="a", echo=True, logprobs=1, n=2)
    assert answer.system_fingerprint == "fp_scripted_1"
    assert [choice.text for choice in answer.choices] == ["aHello."] * 2


async def test_an_echo_alone_does_not_keep_a_broken_version(live: Live) -> None:
    await live.publish(content=b"good")
    await live.publish(content=b"later")
    version = await live.services.adapters.active((await live.user()).id)
    assert version is not None
    Path(version.path, "adapter.safetensors").write_bytes(b"spoiled")
    stream = await (await live.openai()).completions.create(model="persona", prompt="a", echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "aHello."


async def test_threat_16_what_is_told_of_prompts_is_bounded(live: Live) -> None:
    body = {"model": "base", "prompt": [[1] * 2100] * 128, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = await live.call("POST", "/v1/completions", json=body, status=413)
    assert answer["error"]["param"] == "logprobs"
    assert live.engine.scored == []
    few = {**body, "prompt": [[1] * 2100] * 4}
    assert len((await live.call("POST", "/v1/completions", json=few))["choices"]) == 4
    await live.call("POST", "/v1/completions", json={**few, "n": 16, "logprobs": 20}, status=413)
    await live.call("POST", "/v1/completions", json={**body, "logprobs": None})  # nothing is told


async def test_a_longer_reply_than_may_be_is_a_reply_of_that_length(start: Start) -> None:
    live = await start(ScriptedEngine("word " * 50), prompt={"max_reply_tokens": 7})
    client = await live.openai()
    said = await client.completions.create(model="base", prompt="a", max_tokens=4096)
    assert (said.choices[0].finish_reason, said.usage.completion_tokens if said.usage else 0) == ("length", 7)


async def test_an_engine_that_fails_is_a_status(start: Start) -> None:
    engine = ScriptedEngine()
    engine.failure = EngineDown("The engine is being restarted.")
    live = await start(engine)
    await live.call("POST", "/v1/completions", json={"model": "base", "prompt": "a"}, status=503)


async def test_a_client_that_leaves_ends_every_choice(start: Start) -> None:
    live = await start(ScriptedEngine("word " * 400, delay=0.01))
    client = await live.openai()
    stream = await client.completions.create(model="base", prompt=["a"] * 40, stream=True, max_tokens=300)
    await anext(stream)
    assert len(live.engine.requests) == 16  # the others wait for their turn
    await stream.close()
    async with asyncio.timeout(10):
        while live.services.chat.running:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert len(live.engine.requests) == live.engine.aborted


# --- the tiny model


async def test_a_scored_prompt_is_what_the_plain_model_says(
    tiny: Live, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    models = Models(tmp_path_factory.getbasetemp() / "models")
    text = "<|im_start|>user\nthe quick brown fox, Привет 👍<|im_end|>\n"
    client = await tiny.openai()
    answer = await client.completions.create(model="base", prompt=text, echo=True, logprobs=3, max_tokens=0)
    told, tokens = answer.choices[0].logprobs, tiny.services.tokenizer.raw(text)[0]
    assert told is not None
    assert tokens[0] == 1  # a special token in a raw prompt is meant
    whole = logits(models.decoder(), tokens).log_softmax(-1)[:-1]
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    found = torch.tensor(told.token_logprobs[1:])
    assert (found - whole[range(len(tokens) - 1), tokens[1:]]).abs().mean() < CLOSE
    assert told.text_offset is not None
    ends = [*told.text_offset[1:], len(text)]
    shown = [text[begin:end] for begin, end in zip(told.text_offset, ends, strict=True)]
    assert "".join(shown) == answer.choices[0].text == text
    tokens_only = await client.completions.create(model="base", prompt=tokens, echo=True, logprobs=3, max_tokens=0)
    assert tokens_only.choices[0].text == text
    assert tokens_only.choices[0].logprobs is not None
    assert tokens_only.choices[0].logprobs.token_logprobs == told.token_logprobs
    # An adapter scores otherwise, and a reply is told of by the same numbers as a prompt.
    shape, base = models.decoder().shape, tiny.services.base()
    ref = adapters.sparse(tmp_path / "made", shape, base, user=1, number=1)
    content = Path(ref.path, "adapter.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == ref.sha256
    await tiny.publish(content=content)
    options: Any = {"model": "persona", "logprobs": 0, "temperature": 0}
    mine = await client.completions.create(prompt=text, echo=True, max_tokens=8, **options)
    assert mine.choices[0].logprobs is not None
    numbers = mine.choices[0].logprobs.token_logprobs
    assert numbers is not None
    assert numbers[1 : len(tokens)] != pytest.approx(told.token_logprobs[1:], abs=CLOSE)
    assert len(numbers) == len(tokens) + 8
