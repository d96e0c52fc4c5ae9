"""The one device memory, as bytes: what pages.py numbers, and what keys, values and factors are views of.

    page 0            | page 1            | …            | page n − 1
    page_bytes        | page_bytes        |              | page_bytes

A page has no kind of its own. As context it is [layers, 2, size, kv_heads, head_dim] (attention.py); a run of
neighbouring pages is one stretch of bytes in which an adapter's factors stand one behind another (lora.py). Whoever
gets a page writes all that will be read of it: nothing of an earlier owner is seen through another type.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch


class Memory:
    """`pages` pages of `page_bytes` bytes each, not initialized. bytes: uint8 [pages · page_bytes]."""

    def __init__(self, pages: int, page_bytes: int, device: torch.device) -> None:
        self.pages, self.page_bytes = pages, page_bytes
        self.bytes = torch.empty(pages * page_bytes, dtype=torch.uint8, device=device)

    def run(self, pages: Sequence[int]) -> torch.Tensor:
        """Neighbouring ascending pages → their bytes [len(pages) · page_bytes]."""
        assert list(pages) == list(range(pages[0], pages[0] + len(pages))), "not a run"
        return self.bytes[pages[0] * self.page_bytes : (pages[-1] + 1) * self.page_bytes]

    def needed(self, nbytes: int) -> int:
        """Pages that hold so many bytes: one at least."""
        return max(1, -(-nbytes // self.page_bytes))


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """While a load is written, by the loader's thread: on a GPU in a stream of its own, so that no step waits for it.

    It waits for the steps that were launched before, which may still read what stood in its pages; at its end, be it an
    error, nothing is being written any more.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads: torch keeps what was freed in a stream for that stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
