"""The thought that stands before an answer, taken apart from it while both still arrive.

Only a thought at the very beginning counts: whoever asks what a <think> tag is gets to read the answer.
"""

from persona.chat_tools import held

_OPEN, _CLOSE = "<think>", "</think>"


class Thoughts:
    """Splits one reply into (answer, thought): `hear` each piece, at its end `end`."""

    def __init__(self, *, thinking: bool = False) -> None:
        """thinking: the opening tag stands before what is heard."""
        self._rest = ""
        self._hear = self._within if thinking else self._before

    def hear(self, piece: str) -> tuple[str, str]:
        self._rest += piece
        return self._hear()

    def end(self) -> tuple[str, str]:
        """What was held back."""
        rest, self._rest = self._rest, ""
        return ("", rest) if self._hear == self._within else (rest, "")

    def _before(self) -> tuple[str, str]:
        start = self._rest.lstrip()
        if len(start) < len(_OPEN) and _OPEN.startswith(start):
            return "", ""
        if not start.startswith(_OPEN):
            self._hear = self._after
            return self._hear()
        self._rest = start[len(_OPEN) :]
        self._hear = self._within
        return self._hear()

    def _within(self) -> tuple[str, str]:
        at = self._rest.find(_CLOSE)
        if at < 0:
            return "", self._take(len(self._rest) - held(self._rest, (_CLOSE,)))
        thought = self._take(at)
        self._rest = self._rest[len(_CLOSE) :]
        self._hear = self._between
        return self._hear()[0], thought

    def _between(self) -> tuple[str, str]:
        """The empty lines before the answer belong to neither."""
        self._rest = self._rest.lstrip()
        if self._rest:
            self._hear = self._after
        return self._take(len(self._rest)), ""

    def _after(self) -> tuple[str, str]:
        return self._take(len(self._rest)), ""

    def _take(self, chars: int) -> str:
        taken, self._rest = self._rest[:chars], self._rest[chars:]
        return taken
