"""The paged kernel against plain torch in fp32, around the edges of pages and of the parts that rows are split into.

Tolerances, relative to the largest value: 1e-5 in fp32; in 16 bits three roundings of the type (of the weights, of the
result, and one to spare).
"""

import pytest
import torch

from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import DecodeRows

SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A pool in which everything that no row may see is NaN, and queries of rows of the given lengths."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int = SIZE):
        needed = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(2)).tolist()
        # As the pool lies: keys and values of all layers of a page side by side.
        self.pool = torch.full((len(order), 3, 2, size, kv_heads, dim), torch.nan, dtype=dtype)
        self.keys, self.values = self.pool[:, 1, 0], self.pool[:, 1, 1]
        table = torch.full((len(lengths), max(needed) + 1), order.pop())
        for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            for place in range(count):
                table[row, place] = page = order.pop()
                inside = min(size, length - place * size)
                self.keys[page, :inside] = random(inside, kv_heads, dim, seed=page).to(dtype)
                self.values[page, :inside] = random(inside, kv_heads, dim, seed=page + 1000).to(dtype)
        self.q = (2 * random(len(lengths), heads, dim)).to(dtype)
        self.rows = DecodeRows.of(table, torch.tensor(lengths), size)

    def wanted(self) -> torch.Tensor:
        """What the reference makes of it in fp32, without the NaN."""
        keys, values = self.keys.float().nan_to_num(), self.values.float().nan_to_num()
        return reference.attend(self.q.float(), keys, values, self.rows)

    def check(self, kernels: Kernels) -> torch.Tensor:
        found = kernels.attend(self.q, self.keys, self.values, self.rows)
        assert found.dtype == self.q.dtype
        wanted = self.wanted()
        assert (found.float() - wanted).abs().max() <= TOLERANCE[self.q.dtype] * wanted.abs().max()
        return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (2, 2, 128), (6, 2, 64), (4, 2, 80)])
def test_rows_around_page_edges_see_what_they_wrote_and_no_more(
    kernels: Kernels, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    Case([1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5], heads, kv_heads, dim, dtype).check(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_are_joined_from_their_parts(kernels: Kernels, dtype: torch.dtype) -> None:
    from persona.engine.kernels.triton_attention import SPLIT

    Case([SPLIT - 1, SPLIT, SPLIT + 1, 3, 2 * SPLIT + 40], 4, 2, 64, dtype).check(kernels)


@pytest.mark.parametrize("size", [8, 48, 256])
def test_pages_of_any_size(kernels: Kernels, size: int) -> None:
    Case([1, size, size + 1, 2 * size + 3], 4, 2, 64, torch.float32, size).check(kernels)


def test_a_row_is_the_same_whoever_stands_beside_it(kernels: Kernels) -> None:
    case = Case([40, 7, 300, 17], 4, 2, 64, torch.bfloat16)
    together = case.check(kernels)
    for row in range(4):
        alone = DecodeRows.of(case.rows.pages[row : row + 1], case.rows.lengths[row : row + 1], SIZE)
        assert torch.equal(kernels.attend(case.q[row : row + 1], case.keys, case.values, alone)[0], together[row])


def test_queries_may_be_a_part_of_a_wider_product(kernels: Kernels) -> None:
    case = Case([5, 20], 4, 2, 64, torch.float32)
    wide = torch.cat([case.q, random(2, 4, 64, seed=9)], 1)
    parts, wanted = wide[:, :4], case.wanted()
    assert not parts.is_contiguous()
    assert torch.allclose(kernels.attend(parts, case.keys, case.values, case.rows), wanted, atol=1e-5)
