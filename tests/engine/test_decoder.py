"""Our decoder against transformers' model that holds the same dequantized weights.

Tolerances, in standard deviations of the reference's logits: computed in fp32 ours differs by less than 1e-4 at most,
so the network is the same; in bf16, as it serves, by less than 0.06 in the root mean square, all of it rounding.
"""

import pytest
import torch
import transformers
from models import KINDS, Models, reference
from plain import drained, logits, some_tokens

from persona.domain import Message, Role
from persona.engine import decoder, head
from persona.engine.decoder import Decoder
from persona.engine.prepare import Prepared
from persona.engine.shape import FUSED, TARGETS
from persona.engine.text import Text

FORMS = ["int4", "nf4", "none"]
EXACT, ROUNDED = 1e-4, 0.06


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Largest and root mean square difference, in standard deviations of `theirs`."""
    difference = (ours - theirs) / theirs.std()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


@torch.no_grad()
def theirs(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_equals_transformers_model_of_the_same_weights(models: Models, kind: str, form: str) -> None:
    ours = models.decoder(kind, form)
    model = reference(ours, models.checkpoint(kind))
    tokens = some_tokens(100)  # more rows than the int4 kernel takes: all forms can compute in fp32
    wanted = theirs(model, tokens)
    _, rounded = compare(logits(ours, tokens), wanted)
    few = compare(logits(ours, tokens[:40]), wanted[:40])[1]
    ours.dtype = torch.float32
    most, _ = compare(logits(ours, tokens), wanted)
    assert most < EXACT
    assert max(rounded, few) < ROUNDED


@pytest.mark.parametrize("kind", KINDS)
def test_without_quantization_the_weights_are_the_checkpoints_own(models: Models, kind: str) -> None:
    ours = models.decoder(kind, "none")
    ours.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(models.checkpoint(kind), dtype=torch.float32).eval()
    tokens = some_tokens(100, seed=2)
    assert compare(logits(ours, tokens), theirs(model, tokens))[0] < EXACT


def test_long_positions_turn_as_transformers_turns_them(models: Models) -> None:
    for kind in ("llama", "llama3-rope"):
        ours = models.decoder(kind, "none")
        ours.dtype = torch.float32
        model = reference(ours, models.checkpoint(kind))
        positions = torch.tensor([0, 1, 63, 64, 500, 1023])
        cos, sin = model.model.rotary_emb(torch.zeros(1, 6, 64), positions[None])
        mine = ours.rotary(positions)
        assert torch.allclose(mine[0][:, 0], cos[0], atol=1e-4)
        assert torch.allclose(mine[1][:, 0], sin[0], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_head_is_the_embedding_itself(models: Models, form: str) -> None:
    tied, untied = models.decoder("llama", form), models.decoder("llama-untied", form)
    assert tied.head is tied.embed
    assert untied.head is not untied.embed
    assert untied.nbytes() > tied.nbytes()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_head_held_in_bf16_gives_the_same_logits_and_gradients(models: Models, kind: str) -> None:
    wide, narrow = models.decoder(kind), models.decoder(kind)
    wide.widen()
    assert (wide.head.dtype, narrow.head.dtype) == (torch.float32, torch.bfloat16)
    assert (narrow.head is narrow.embed) == narrow.shape.tied
    assert narrow.nbytes() < wide.nbytes()
    found = []
    for ours in (wide, narrow):
        x = torch.randn(7, ours.shape.hidden, generator=torch.Generator().manual_seed(3)).requires_grad_()
        normed = ours.spoken(x)
        logits = drained(head.logits(ours, normed.detach()))
        assert torch.equal(logits, ours.logits(x.detach()))
        slope = logits.clone()
        loss = drained(head.cross_entropy(slope, torch.full((7,), 5), torch.ones(7)))
        assert loss == pytest.approx(-float(logits.log_softmax(-1)[:, 5].sum()), rel=1e-5)
        normed.backward(drained(head.gradient(ours, slope)))
        assert x.grad is not None
        found.append((logits, x.grad))
        y = x.detach().clone().requires_grad_()
        plain = torch.nn.functional.linear(ours.spoken(y), ours.head[:].float())
        (-plain.log_softmax(-1)[:, 5].sum()).backward()
        assert torch.allclose(y.grad, x.grad, atol=1e-5)
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_no_weight_of_the_base_asks_for_a_gradient(models: Models) -> None:
    ours = models.decoder("qwen3")
    assert not any(t.requires_grad for t in (ours.embed.values, ours.norm, ours.head.values))
    assert not any(layer.attn_norm.requires_grad or layer.mlp_norm.requires_grad for layer in ours.layers)


def _hugging_face(ours: Decoder) -> transformers.LlamaForCausalLM:
    """transformers' Llama around the weights of a prepared model."""
    shape = ours.shape
    theta = shape.inv_freq[1] ** (-shape.head_dim / 2)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.eps,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": ours.embed[:].float(), "model.norm.weight": ours.norm}
    for index, layer in enumerate(ours.layers):
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = layer.attn_norm
        state[prefix + "post_attention_layernorm.weight"] = layer.mlp_norm
        for target in TARGETS:
            parts = layer.projections[target].dense(torch.float32).t().split(shape.rows(target))
            state |= {f"{prefix}{module}.weight": part for module, part in zip(FUSED[target], parts, strict=True)}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def test_the_embedded_model_equals_transformers_llama(embedded_model: Prepared) -> None:
    ours = decoder.load(embedded_model.folder, "int4", "cpu")
    text = Text.load(embedded_model.folder)
    question = Message(Role.USER, "What is the capital of France? Answer in one short sentence. " * 4)
    tokens = text.render([question], reply=True).tokens[-100:]
    wanted = theirs(_hugging_face(ours), tokens)
    assert len(tokens) > 80
    rounded = compare(logits(ours, tokens), wanted)[1]
    ours.dtype = torch.float32
    assert compare(logits(ours, tokens), wanted)[0] < EXACT
    assert rounded < ROUNDED


def test_the_embedded_model_knows_the_capital_of_france(embedded_model: Prepared) -> None:
    ours = decoder.load(embedded_model.folder, "int4", "cpu")
    text = Text.load(embedded_model.folder)
    following = logits(ours, text.encode("The capital of France is"))[-1].argmax()
    assert text.decode([int(following)]) == " Paris"
