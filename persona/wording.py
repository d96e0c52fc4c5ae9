"""Prompts of an exact number of tokens, made of common words, other words for each request.

How many tokens a word takes is asked of whoever will read the prompt, so it holds for any tokenizer that splits at
spaces. Words are random: a cache of prefixes finds nothing but the template.
"""

from collections.abc import Awaitable, Callable
from random import Random

from persona.errors import RequestError

FIRST = "the"
_TEXT = """
the of and to in is you that it he was for on are as with his they I at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could
people my than first water been call who its now find long down day did get come made may part
"""
WORDS = tuple(_TEXT.split())

Count = Callable[[str], Awaitable[int]]  # tokens of the whole prompt that holds this text


class Wording:
    """Makes texts. `least`: tokens of the prompt whose text is FIRST alone; `costs`: tokens that a word adds."""

    def __init__(self, least: int, costs: dict[str, int]) -> None:
        self.least = least
        self._words = [word for word, cost in costs.items() if cost == 1]
        if not self._words:
            raise RequestError("No common word is one token for this model, so prompts cannot have an exact length.")

    @classmethod
    async def measure(cls, count: Count) -> "Wording":
        """Find out what the words cost."""
        least = await count(FIRST)
        return cls(least, {word: await count(f"{FIRST} {word}") - least for word in WORDS})

    def text(self, tokens: int, seed: int) -> str:
        """A text with which the prompt has `tokens` tokens. Raises RequestError if it cannot be so short."""
        if tokens < self.least:
            raise RequestError(
                f"A prompt has at least {self.least} tokens, of which all but one are the chat template's and the"
                " system text's: ask for longer ones with --prompt."
            )
        return " ".join([FIRST, *Random(seed).choices(self._words, k=tokens - self.least)])
