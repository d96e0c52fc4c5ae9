"""The paged kernel against plain torch in fp32, around the edges of pages and of the parts that rows are split into.

Tolerances, relative to the largest value: 1e-5 in fp32; in 16 bits three roundings of the type (of the weights, of the
result, and one to spare).
"""

import pytest
import torch

from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import QUERIES, DecodeRows, Piece, PromptGroups, PromptRows

SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pool:
    """Pages of sequences of the given lengths, in which everything that none of them wrote is NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, size: int = SIZE):
        needed = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(2)).tolist()
        # As the pool lies: keys and values of all layers of a page side by side.
        self.pool = torch.full((len(order), 3, 2, size, kv_heads, dim), torch.nan, dtype=dtype)
        self.keys, self.values = self.pool[:, 1, 0], self.pool[:, 1, 1]
        self.spare, self.pages = order.pop(), list[list[int]]()
        for length, count in zip(lengths, needed, strict=True):
            self.pages.append([order.pop() for _ in range(count)])
            for place, page in enumerate(self.pages[-1]):
                inside = min(size, length - place * size)
                self.keys[page, :inside] = random(inside, kv_heads, dim, seed=page).to(dtype)
                self.values[page, :inside] = random(inside, kv_heads, dim, seed=page + 1000).to(dtype)

    @property
    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in fp32, without the NaN."""
        return self.keys.float().nan_to_num(), self.values.float().nan_to_num()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.float() - wanted).abs().max() <= TOLERANCE[found.dtype] * wanted.abs().max()


class Case:
    """Queries of decode rows of the given lengths."""

    def __init__(self, lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int = SIZE):
        pool = self.pool = Pool(lengths, kv_heads, dim, dtype, size)
        self.keys, self.values = pool.keys, pool.values
        table = torch.full((len(lengths), max(map(len, pool.pages)) + 1), pool.spare)
        for row, pages in enumerate(pool.pages):
            table[row, : len(pages)] = torch.tensor(pages)
        self.q = (2 * random(len(lengths), heads, dim)).to(dtype)
        self.rows = DecodeRows.of(table, torch.tensor(lengths), size)

    def wanted(self) -> torch.Tensor:
        """What the reference makes of it in fp32."""
        return reference.attend(self.q.float(), *self.pool.plain, self.rows)

    def check(self, kernels: Kernels) -> torch.Tensor:
        found = kernels.attend(self.q, self.keys, self.values, self.rows)
        assert found.dtype == self.q.dtype
        close(found, self.wanted())
        return found


class Prompts:
    """Pieces of prompts, each (first token, token after the last) of its sequence, one behind the other."""

    def __init__(
        self, pieces: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int = SIZE
    ):
        self.pool, self.pieces, start = Pool([end for _, end in pieces], kv_heads, dim, dtype, size), list[Piece](), 0
        for (first, end), pages in zip(pieces, self.pool.pages, strict=True):
            self.pieces.append(Piece(start, start + end - first, first, pages))
            start += end - first
        self.q = (2 * random(start, heads, dim)).to(dtype)
        self.size = size

    def rows(self) -> PromptRows:
        return PromptRows.of(self.pieces, self.q.device)

    def check(self, kernels: Kernels) -> torch.Tensor:
        found = kernels.attend_prompts(self.q, self.pool.keys, self.pool.values, self.rows())
        assert found.dtype == self.q.dtype
        groups = PromptGroups.of(self.pieces, self.size, self.q.device)
        close(found, reference.attend_prompts(self.q.float(), *self.pool.plain, groups))
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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (2, 2, 128), (6, 2, 64), (4, 2, 80)])
def test_tokens_of_prompts_see_what_stands_before_them_and_no_more(
    kernels: Kernels, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Pieces that begin and end around the edges of pages and of blocks, behind what was computed before."""
    pieces = [(0, 1), (0, SIZE), (3, SIZE + 1), (SIZE, SIZE + 5), (5, 5 + QUERIES + 1), (2 * SIZE - 1, 2 * SIZE)]
    Prompts(pieces, heads, kv_heads, dim, dtype).check(kernels)


@pytest.mark.parametrize("size", [8, 48, 256])
def test_prompts_on_pages_of_any_size(kernels: Kernels, size: int) -> None:
    Prompts([(0, size), (size - 1, size + 2)], 4, 2, 64, torch.float32, size).check(kernels)


def test_a_token_is_the_same_in_pieces_of_any_length_whoever_stands_beside_it(kernels: Kernels) -> None:
    case = Prompts([(0, 100), (30, 47)], 4, 2, 64, torch.bfloat16)
    together, pages = case.check(kernels), case.pool.pages[0]
    for cut in (1, 64, 71):
        some = [Piece(0, cut, 0, pages), Piece(cut, 100, cut, pages)]
        rows = PromptRows.of(some, case.q.device)
        found = kernels.attend_prompts(case.q[:100], case.pool.keys, case.pool.values, rows)
        assert torch.equal(found, together[:100])


def test_what_is_not_finite_in_a_prompt_is_not_seen_by_others(kernels: Kernels) -> None:
    case = Prompts([(0, 20), (0, 30)], 4, 2, 64, torch.float32)
    sound = case.check(kernels)
    case.pool.keys[case.pool.pages[0][1], 0] = case.pool.values[case.pool.pages[0][1], 0] = torch.nan
    found = kernels.attend_prompts(case.q, case.pool.keys, case.pool.values, case.rows())
    assert torch.equal(found[20:], sound[20:])
    assert found[SIZE:20].isnan().all()
