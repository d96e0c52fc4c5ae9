"""Converts a checkpoint into the tensors of a prepared model: fused projections, 4-bit codes, a plain shape file.

    embed, head (if not tied)                           as they were, bf16, or their parts, see words.py
    norm                                                as it was, fp32
    layers.<i>.{attn_norm,mlp_norm,q_norm,k_norm}       as they were, fp32
    layers.<i>.{qkv,o,gate_up,down}.<part>              parts of the 4-bit form, see weights.py
    layers.<i>.{qkv,o}.bias                             fp32, where the family has them

The embedded GGUF's Q4_1 blocks become int4 codes without requantizing: the codes are copied, only their scales are
rounded from fp16 to bf16. Its embedding's Q8_0 blocks are copied whole. Architectures that the decoder would compute
wrongly are refused by name.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from persona.engine import quantize, words
from persona.engine.shape import FUSED
from persona.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KINDS = ("default", "linear", "llama3")
Tensors = dict[str, torch.Tensor]
Notify = Callable[[str, float], None]


class MissingTensor(ModelError):
    """The checkpoint does not have a tensor of that name."""


def from_gguf(file: Path, out: Path, weights: str, source: str, notify: Notify) -> None:
    """Convert a llama GGUF whose projections are Q4_1."""
    import gguf

    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shape = _gguf_shape(lambda key: reader.fields[key].contents())
    made = _gguf_words(tensors["token_embd.weight"]) | {"norm": _dense(tensors["output_norm.weight"])}
    for layer in range(shape["layers"]):
        notify("converting the model's weights", layer / shape["layers"])
        made |= _gguf_layer(tensors, layer, shape, weights)
    save_file(made, out / "weights.safetensors")
    notify("converting the tokenizer", 1.0)
    _save_tokenizer(str(file.parent), out, shape, gguf_file=file.name)
    _save_shape(out, shape, "llama", source, weights)


def from_pretrained(name: str, out: Path, weights: str, notify: Notify) -> None:
    """Convert a Hugging Face id or a local folder of one of FAMILIES."""
    folder = _locate(name, notify)
    config = _config(folder, name)
    check_supported(config)
    shape = _config_shape(config)
    read = _reader(folder)
    made: Tensors = {"embed": read("model.embed_tokens.weight").bfloat16(), "norm": read("model.norm.weight").float()}
    if not shape["tied"]:
        made["head"] = read("lm_head.weight").bfloat16()
    for layer in range(shape["layers"]):
        notify("converting the model's weights", layer / shape["layers"])
        made |= _layer(read, layer, weights)
    save_file(made, out / "weights.safetensors")
    notify("converting the tokenizer", 1.0)
    _save_tokenizer(str(folder), out, shape)
    _save_shape(out, shape, config.model_type, name, weights)


def check_supported(config: Any) -> None:
    """Raise ModelError for what the decoder would compute wrongly without a word."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(f"The architecture {kind} is not tested here; use one of {', '.join(FAMILIES)}.")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    faults = {
        f"rope type {rope}": rope not in ROPE_KINDS,
        "sliding windows": sliding or (kind == "mistral" and getattr(config, "sliding_window", None) is not None),
        "experts": bool(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)),
        "layers without positions": 0 in (getattr(config, "no_rope_layers", None) or [1]),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        "biases in the MLP": bool(getattr(config, "mlp_bias", False)),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise ModelError(f"This {kind} model uses {' and '.join(found)}, which persona does not compute; use another.")


def _gguf_shape(field: Callable[[str], Any]) -> dict[str, Any]:
    heads = field("llama.attention.head_count")
    hidden = field("llama.embedding_length")
    dim = field("llama.rope.dimension_count")
    if field("general.architecture") != "llama" or dim != hidden // heads:
        raise ModelError("This GGUF file is not a plain llama model; use a Hugging Face folder in its place.")
    frequencies = field("llama.rope.freq_base") ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return {
        "layers": field("llama.block_count"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": field("llama.attention.head_count_kv"),
        "head_dim": dim,
        "intermediate": field("llama.feed_forward_length"),
        "vocab": field("llama.vocab_size"),
        "eps": field("llama.attention.layer_norm_rms_epsilon"),
        "tied": True,
        "inv_freq": frequencies.tolist(),
        "rope_scale": 1.0,
        "context": field("llama.context_length"),
        "eos": [field("tokenizer.ggml.eos_token_id")],
    }


def _gguf_layer(tensors: dict[str, Any], layer: int, shape: dict[str, Any], weights: str) -> Tensors:
    names = {"qkv": ("attn_q", "attn_k", "attn_v"), "o": ("attn_output",)}
    names |= {"gate_up": ("ffn_gate", "ffn_up"), "down": ("ffn_down",)}
    heads = {"attn_q": shape["heads"], "attn_k": shape["kv_heads"]}
    made: Tensors = {
        f"layers.{layer}.attn_norm": _dense(tensors[f"blk.{layer}.attn_norm.weight"]),
        f"layers.{layer}.mlp_norm": _dense(tensors[f"blk.{layer}.ffn_norm.weight"]),
    }
    for fused, parts in names.items():
        blocks = [_unpermuted(tensors[f"blk.{layer}.{p}.weight"], heads.get(p)) for p in parts]
        codes, scales = quantize.from_q4_1(np.concatenate(blocks))
        if weights != "int4":
            made |= _named(layer, fused, quantize.encode(quantize.int4_dense(codes, scales), weights))
        else:
            made |= _named(layer, fused, {"codes": quantize.pack_nibbles(codes), "scales": scales})
    return made


def _gguf_words(tensor: Any) -> Tensors:
    if tensor.tensor_type.name != "Q8_0":
        return {"embed": _dense(tensor).bfloat16()}
    return {f"embed.{part}": values for part, values in words.from_q8_0(tensor.data).items()}


def _unpermuted(tensor: Any, heads: int | None) -> "np.ndarray[Any, Any]":
    """Rows of a Q4_1 tensor in Hugging Face order: GGUF interleaves the two rotary halves of q and k."""
    if tensor.tensor_type.name != "Q4_1":
        raise ModelError(f"The GGUF tensor {tensor.name} is {tensor.tensor_type.name}; only Q4_1 files are tested.")
    rows: np.ndarray[Any, Any] = tensor.data
    if heads is None:
        return rows
    order = np.arange(len(rows)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows[order]


def _dense(tensor: Any) -> torch.Tensor:
    import gguf

    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def _layer(read: Callable[[str], torch.Tensor], layer: int, weights: str) -> Tensors:
    prefix = f"model.layers.{layer}."
    made: Tensors = {
        f"layers.{layer}.attn_norm": read(prefix + "input_layernorm.weight").float(),
        f"layers.{layer}.mlp_norm": read(prefix + "post_attention_layernorm.weight").float(),
    }
    for norm in ("q_norm", "k_norm"):
        if (tensor := _optional(read, f"{prefix}self_attn.{norm}.weight")) is not None:
            made[f"layers.{layer}.{norm}"] = tensor.float()
    for fused, parts in FUSED.items():
        dense = torch.cat([read(f"{prefix}{part}.weight") for part in parts])
        made |= _named(layer, fused, quantize.encode(dense, weights))
        biases = [_optional(read, f"{prefix}{part}.bias") for part in parts]
        if all(bias is not None for bias in biases):
            made[f"layers.{layer}.{fused}.bias"] = torch.cat([b.float() for b in biases if b is not None])
    return made


def _named(layer: int, fused: str, parts: Tensors) -> Tensors:
    return {f"layers.{layer}.{fused}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def _optional(read: Callable[[str], torch.Tensor], name: str) -> torch.Tensor | None:
    try:
        return read(name)
    except MissingTensor:
        return None


def _locate(name: str, notify: Notify) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    notify(f"fetching {name} from the Hugging Face hub", 0.0)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
    except Exception as error:  # the hub client raises a dozen kinds
        kind = type(error).__name__
        raise ModelError(f"The model {name} is no local folder and cannot be fetched from the hub ({kind}).") from None


def _config(folder: Path, name: str) -> Any:
    """The checkpoint's configuration. Code that comes with a model is never run."""
    from transformers import AutoConfig

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"There is no readable config.json in {name}.") from None
    if kind not in FAMILIES:
        raise ModelError(f"The architecture {kind} is not tested here; use one of {', '.join(FAMILIES)}.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"The configuration of {name} cannot be read ({type(error).__name__}).") from None


def _reader(folder: Path) -> Callable[[str], torch.Tensor]:
    """A function that reads one tensor by name from the folder's safetensors files. Raises MissingTensor."""
    files: list[Path] = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"There is no safetensors file in {folder}; other formats are not loaded.")
    handles: list[Any] = [safe_open(file, framework="pt") for file in files]
    where = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118 - safe_open has no __iter__

    def read(name: str) -> torch.Tensor:
        if name not in where:
            raise MissingTensor(f"The checkpoint lacks the tensor {name}.")
        tensor: torch.Tensor = where[name].get_tensor(name)
        return tensor

    return read


def _config_shape(config: Any) -> dict[str, Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "default":
        theta = config.rope_parameters["rope_theta"]
        inverse, scale = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim), 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    eos = config.eos_token_id
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": dim,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "tied": bool(config.tie_word_embeddings),
        "inv_freq": inverse.tolist(),
        "rope_scale": float(scale),
        "context": config.max_position_embeddings,
        "eos": sorted(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    }


def _save_tokenizer(folder: str, out: Path, shape: dict[str, Any], **options: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if not tokenizer.chat_template:
        raise ModelError("This model has no chat template; use an instruct model.")
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    chat = {"template": tokenizer.chat_template, "special": special}
    (out / "chat.json").write_text(json.dumps(chat, indent=1), encoding="utf-8")
    if tokenizer.eos_token_id is not None:
        shape["eos"] = sorted({*shape["eos"], *_generation_eos(Path(folder)), tokenizer.eos_token_id})


def _generation_eos(folder: Path) -> Iterator[int]:
    """Instruct models name their end-of-turn token in generation_config.json only."""
    try:
        eos = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id", [])
    except (OSError, ValueError):
        return
    yield from eos if isinstance(eos, list) else [eos]


def _save_shape(out: Path, shape: dict[str, Any], family: str, source: str, weights: str) -> None:
    about = shape | {"family": family, "source": source, "weights": weights}
    (out / "model.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
