"""What others make of the same shape: PEFT's mixed batch over transformers with bitsandbytes' Linear4bit."""

import time

import bitsandbytes
import peft
import torch
import transformers
from gpu_model import Size
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftBatch:
    """Adapters are of the ranks that ours have, in turn; a row names its own with `adapter_names`."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._device = size, device
        self._model = peft.get_peft_model(_base(size, dtype, device), self._form(0), adapter_name="0")
        for number in range(1, max(size.rows)):
            self._model.add_adapter(str(number), self._form(number))
        self._model.eval()

    @torch.no_grad()
    def tokens_per_second(self, rows: int, adapted: bool) -> float:
        """Greedy steps behind `length` tokens."""
        size = self._size
        names = [str(row) if adapted else "__base__" for row in range(rows)]
        past = transformers.DynamicCache(config=self._model.config)
        tokens = torch.ones(rows, size.length, dtype=torch.int64, device=self._device)
        for step in range(size.steps + 2):
            if step == 2:  # the prompt and one step do not count
                self._synchronize()
                started = time.perf_counter()
            found = self._model(
                input_ids=tokens, past_key_values=past, use_cache=True, adapter_names=names, logits_to_keep=1
            )
            tokens = found.logits[:, -1:].argmax(-1)
            tokens.tolist()
        self._synchronize()
        return rows * size.steps / (time.perf_counter() - started)

    @torch.no_grad()
    def seconds(self, rows: int, prompt: int, reply: int) -> float:
        """Greedy replies of so many tokens to so many rows, from the prompts on, every row with its own adapter."""
        names = [str(row) for row in range(rows)]
        past = transformers.DynamicCache(config=self._model.config)
        tokens = torch.randint(2000, 40_000, (rows, prompt), device=self._device)
        self._synchronize()
        started = time.perf_counter()
        for _ in range(reply):
            found = self._model(
                input_ids=tokens, past_key_values=past, use_cache=True, adapter_names=names, logits_to_keep=1
            )
            tokens = found.logits[:, -1:].argmax(-1)
            tokens.tolist()
        return time.perf_counter() - started

    def _form(self, number: int) -> peft.LoraConfig:
        rank = self._size.ranks[number % len(self._size.ranks)]
        return peft.LoraConfig(r=rank, target_modules=MODULES, init_lora_weights=False)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _base(size: Size, dtype: torch.dtype, device: torch.device) -> transformers.LlamaForCausalLM:
    """Made layer by layer, each quantized at once, so that no more than one lies there in 16 bits."""
    shape = size.shape
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=0,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(device, dtype)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # in fp32
    config.num_hidden_layers = shape.layers
    for index in range(shape.layers):
        with torch.device(device):
            layer = LlamaDecoderLayer(config, index).to(dtype)
        for name in MODULES:
            parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            setattr(parent, name, _quantized(getattr(parent, name), dtype, device))
        model.model.layers.append(layer)
    model.is_loaded_in_4bit = True  # what PEFT looks at
    return model.eval()


def _quantized(linear: torch.nn.Linear, dtype: torch.dtype, device: torch.device) -> bitsandbytes.nn.Linear4bit:
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = linear.weight.data.normal_(0, linear.in_features**-0.5)
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(device)
    return made
