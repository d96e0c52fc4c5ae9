"""PEFT on transformers, in this process: a mixed batch with `adapter_names`, and single requests with adapter swaps.

The base is dequantized to `dtype`; adapters are loaded from the folders that persona exported. Both ways are those of
PEFT's guide to LoRA («Inference with different LoRA adapters in the same batch», `set_adapter`).
"""

import asyncio
from collections.abc import Sequence

import peft
import torch
import transformers
from peer import Setup

from persona.engine import weights
from persona.workload import Request, Workload


class Peft:
    """Base and adapters, shared by both ways to use them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    async def start(self, setup: Setup) -> None:
        self._setup = setup
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        torch.set_num_threads(weights.threads(self._setup.settings.engine.threads))
        base = transformers.AutoModelForCausalLM.from_pretrained(self._setup.checkpoint, dtype=self._dtype)
        first, *others = self._setup.peft
        model = peft.PeftModel.from_pretrained(base, first, adapter_name="0")
        for number, folder in enumerate(others, 1):
            model.load_adapter(folder, adapter_name=str(number))
        self._model = model.eval()

    def generate(self, requests: Sequence[Request], **options: object) -> list[list[int]]:
        """The new tokens of each request, greedy; prompts are padded on the left."""
        prompts = [self._setup.tokens(request) for request in requests]
        longest, reply = max(map(len, prompts)), requests[0].reply
        assert all(request.reply == reply for request in requests), "one batch ends together"
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in prompts])
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])
        made = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=reply,
            min_new_tokens=reply,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        found: list[list[int]] = made[:, longest:].tolist()
        return found

    async def stop(self) -> None:
        del self._model


class PeftBatch(Peft):
    """All requests in one batch, each row with its own adapter."""

    name = "peft-batch"

    async def run(self, requests: Sequence[Request], workload: Workload) -> list[int]:
        return [len(reply) for reply in await asyncio.to_thread(self.replies, requests)]

    def replies(self, requests: Sequence[Request]) -> list[list[int]]:
        return self.generate(requests, adapter_names=[str(request.user) for request in requests])


class PeftSwap(Peft):
    """One request after another; the adapter is switched before each."""

    name = "peft-swap"

    async def run(self, requests: Sequence[Request], workload: Workload) -> list[int]:
        return [len(reply) for reply in await asyncio.to_thread(self.replies, requests)]

    def replies(self, requests: Sequence[Request]) -> list[list[int]]:
        found = []
        for request in requests:
            self._model.set_adapter(str(request.user))
            found += self.generate([request])
        return found
