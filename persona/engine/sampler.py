"""From logits to the next token, one row at a time where rows differ, all at once where they are greedy.

Each seeded sequence owns its generator, so its draws do not depend on who else is in the batch.
"""

from collections.abc import Collection, Sequence

import torch

from persona.engine.protocol import Sampling

COLDEST = 1e-5  # temperatures up to here are greedy: dividing by them would overflow


class Sampler:
    """Draws for one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()  # on the CPU: the same draws on every device
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % (1 << 63))

    @property
    def greedy(self) -> bool:
        return not (self._sampling.temperature > COLDEST and self._sampling.top_p > 0)

    def draw(self, logits: torch.Tensor) -> int:
        """logits: [vocab] fp32 on the CPU → a token, by temperature and nucleus (Holtzman et al. 2020)."""
        if self.greedy:
            return int(logits.argmax())
        probabilities = torch.softmax((logits - logits.max()) / self._sampling.temperature, -1)
        if self._sampling.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self._random))
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass in front of each token: the first always stays
        ordered[before >= self._sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=self._random)])


def without(logits: torch.Tensor, rows: Sequence[bool], tokens: Collection[int]) -> torch.Tensor:
    """logits: [rows, vocab] → the same, in place, with `tokens` impossible where `rows` says so."""
    if chosen := [[row] for row, wanted in enumerate(rows) if wanted and tokens]:
        logits[chosen, list(tokens)] = -torch.inf
    return logits


def draw(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """logits: [rows, vocab] → one token a row."""
    best = logits.argmax(-1).tolist()
    sampled = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if sampled:
        on_cpu = logits[sampled].float().cpu()
        for index, row in enumerate(sampled):
            best[row] = samplers[row].draw(on_cpu[index])
    return [int(token) for token in best]
