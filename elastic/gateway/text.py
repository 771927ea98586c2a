"""From a stream of token ids to a stream of text: whole characters only, and nothing that may belong to a stop string.

Pure, and independent of how the tokens were cut into messages: the pieces of a stream always add up to the text that
the same tokens give in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = (
    6  # of the prompt at least, so that the first token's leading space is not taken for the start of a text
)
MAX_PENDING_TOKENS = 64  # decoded at a time where no text is ever settled as a whole; far more than a character needs


def incomplete(text: str) -> int:
    """How many characters at the end later tokens may still change: the last one, if its bytes are not all there."""
    return int(text.endswith(REPLACEMENT))


class Detokenizer:
    """Gives out text once later tokens cannot change it any more.

    `unsettled` says how many characters at the end of a text may still change. It decodes a window of tokens that
    begins where the text was last settled as a whole, so that the work per token does not grow with the answer.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int] = (),
        unsettled: Callable[[str], int] = incomplete,
    ) -> None:
        self._decode = decode
        self._unsettled = unsettled
        tokens = CONTEXT_TOKENS
        while not self._settled(before := decode(prompt[-tokens:])) and tokens < len(prompt):
            tokens *= 2
        self._ids = list(prompt[-tokens:])
        self._fresh = len(self._ids)  # of the window, those before it were given out whole
        self._prompt_text = before
        self._sent = self._settled(before)  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        fresh = self._pass(text, self._settled(text))
        if fresh and self._sent == len(text):
            self._shorten(self._ids[self._fresh :], whole=True)
        elif fresh and len(self._ids) > MAX_PENDING_TOKENS:
            self._shorten(self._ids[-MAX_PENDING_TOKENS // 2 :], whole=False)
        return fresh

    def flush(self) -> str:
        """What is pending, complete or not."""
        text = self._decode(self._ids)
        return self._pass(text, len(text))

    def _pass(self, text: str, end: int) -> str:
        """What is new up to `end`. A character that the prompt left incomplete is new once it is complete."""
        start = self._sent
        if self._prompt_text and text.startswith(self._prompt_text):
            start = max(start, len(self._prompt_text))
        if end <= start:
            return ""
        self._prompt_text = ""
        self._sent = end
        return text[start:end]

    def _shorten(self, window: list[int], *, whole: bool) -> None:
        """Decode from `window` on, unless it has no text that was given out. `whole`: all of it was."""
        text = self._decode(window)
        sent = len(text) if whole else self._settled(text)
        if sent:
            self._ids, self._fresh, self._sent = window, len(window), sent

    def _settled(self, text: str) -> int:
        return len(text) - self._unsettled(text)


class StopMatcher:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    `keep`: that stop string is passed on, too.
    """

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = tuple(stops)
        self.keep = keep
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """What may go out, and whether a stop string was found. The one that is complete first wins.

        Unless `armed`, none that this text completes counts.
        """
        if not self._stops:
            return text, False
        known, text = len(self._held), self._held + text
        found = [] if not armed else [
            (at + len(stop), at)
            for stop in self._stops
            if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]  # fmt: skip
        if found:
            self._held = ""
            end, at = min(found)
            return text[: end if self.keep else at], True
        keep = begun(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back: the text ends here."""
        held, self._held = self._held, ""
        return held


def begun(text: str, literals: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the literals."""
    longest = max(map(len, literals), default=0)
    for length in range(min(len(text), longest - 1), 0, -1):
        end = text[len(text) - length :]
        if any(each.startswith(end) for each in literals):
            return length
    return 0
