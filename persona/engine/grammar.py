"""Grammars that replies are held to: which tokens may come next (llguidance).

Compiling takes a millisecond for most schemas and a second for the worst that are let in, in a thread that lets go of
the GIL: no step waits for it. A mask is computed between two steps, in some ten microseconds.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import structlog
from llguidance import LLMatcher, LLTokenizer

from persona.engine import schema
from persona.errors import RequestError

KEPT = 32  # compiled grammars
log = structlog.get_logger("engine")


class Grammar:
    """Where one reply stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        """Nothing may follow any more."""
        return self._matcher.is_stopped()

    @property
    def lost(self) -> bool:
        """Following it took more than its limits allow."""
        return self._matcher.is_error()

    def allowed(self) -> bytes:
        """One bit a token, the lowest first; no bit at all is set once it is lost."""
        mask = self._matcher.compute_bitmask()
        return bytes(len(mask)) if self.lost else mask

    def took(self, token: int) -> None:
        """The reply goes on with `token`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Compiles for one tokenizer, given as the text of its tokenizer.json.

    Reading that holds the GIL for half a second: make it before anybody is served.
    """

    def __init__(self, tokenizer: str, vocab: int, eos: frozenset[int]) -> None:
        self._tokenizer = _tokenizer(tokenizer, vocab, eos)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()  # touched in that thread only

    def compile(self, text: str) -> "Future[Grammar]":
        """Begin to compile. The future raises RequestError for a grammar that cannot be followed."""
        return self._thread.submit(self._compiled, text)

    def forget(self) -> None:
        """What was compiled: a schema may hold what its user wrote."""
        self._thread.submit(self._kept.clear)

    def _compiled(self, text: str) -> Grammar:
        if self._tokenizer is None:
            raise RequestError("This model's tokenizer cannot be held to a schema.", param="response_format")
        found = self._kept.pop(text, None) or schema.compiled(text, self._tokenizer)
        if found.is_error():
            raise RequestError("The schema cannot be followed; make it smaller.", param="response_format")
        self._kept[text] = found
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return Grammar(found.deep_copy())


def _tokenizer(text: str, vocab: int, eos: frozenset[int]) -> LLTokenizer | None:
    try:
        return LLTokenizer(text, n_vocab=vocab, eos_token=sorted(eos) or None)
    except Exception as error:  # a kind that llguidance does not know: replies without a schema are served
        log.warning("the tokenizer cannot be held to a schema", kind=type(error).__name__)
        return None
