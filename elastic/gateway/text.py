"""From a stream of token ids to a stream of text: whole characters only, and nothing that may belong to a stop string.

Pure, and independent of how the tokens were cut into messages: the pieces of a stream always add up to the text that
the same tokens give in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # of the prompt, so that the first token's leading space is not taken for the start of a text
MAX_PENDING_TOKENS = 16  # far more than one character needs; what is still not whole then never will be


class Detokenizer:
    """Gives out text once its last character is complete."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT_TOKENS:])  # context, then what is pending
        self._context = len(self._ids)
        self._before = decode(self._ids) if self._ids else ""

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        pending = len(self._ids) - self._context
        if len(text) <= len(self._before) or (text.endswith(REPLACEMENT) and pending < MAX_PENDING_TOKENS):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is pending, complete or not."""
        return self._advance(self._decode(self._ids)) if len(self._ids) > self._context else ""

    def _advance(self, text: str) -> str:
        fresh = text[len(self._before) :]
        self._ids = self._ids[self._context :]
        self._context = len(self._ids)
        self._before = self._decode(self._ids)
        return fresh


class StopMatcher:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may go out, and whether a stop string was found. The one that is complete first wins."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back: the text ends here."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
