"""Splits `<think>...</think>` off an answer that comes in pieces, without the newlines around both parts.

Those are the template's: Qwen's own takes them off when it reads its answers again.
"""

from __future__ import annotations

from enum import Enum, auto

from elastic.gateway.text import begun
from membership.base.enums import ReasoningParser

OPEN, CLOSE = "<think>", "</think>"
NEWLINES = "\n"


class Part(Enum):
    """Of an answer."""

    START = auto()  # it may open with <think>
    REASONING = auto()
    GAP = auto()  # newlines after </think>
    CONTENT = auto()


def reasons_first(parser: ReasoningParser, prompt_end: str) -> bool | None:
    """Whether the answer begins with reasoning, by the last characters of the prompt. None: only if it says so."""
    end = prompt_end.rstrip()
    if end.endswith((OPEN, CLOSE)):
        return not end.endswith(CLOSE)
    return True if parser is ReasoningParser.DEEPSEEK_R1 else None


class Reasoning:
    """`first`: as `reasons_first` has it."""

    def __init__(self, first: bool | None) -> None:
        self._first = first
        self._part = Part.CONTENT if first is False else Part.START
        self._pending = ""
        self._begun = False  # some of the reasoning has been given out

    def push(self, text: str) -> tuple[str, str]:
        """What has become sure because of this text: reasoning, content."""
        if self._part is Part.CONTENT:
            return "", text
        self._pending += text
        if self._part is Part.START:
            self._start()
        reasoning = self._reasoning() if self._part is Part.REASONING else ""
        if self._part is Part.GAP:
            self._pending = self._pending.lstrip(NEWLINES)
            if self._pending:
                self._part = Part.CONTENT
        content = ""
        if self._part is Part.CONTENT:
            content, self._pending = self._pending, ""
        return reasoning, content

    def flush(self) -> tuple[str, str]:
        """The answer ends here."""
        left, self._pending = self._pending, ""
        if self._part is Part.REASONING or (self._part is Part.START and self._first):
            return (left if self._begun else left.lstrip(NEWLINES)).rstrip(NEWLINES), ""
        return "", left

    def _start(self) -> None:
        bare = self._pending.lstrip()
        if bare.startswith(OPEN):
            self._pending, self._part = bare[len(OPEN) :], Part.REASONING
        elif not OPEN.startswith(bare):
            self._part = Part.REASONING if self._first else Part.CONTENT

    def _reasoning(self) -> str:
        """Up to </think>, or to what may be the beginning of it, and of the newlines before it."""
        text = self._pending if self._begun else self._pending.lstrip(NEWLINES)
        at = text.find(CLOSE)
        if at >= 0:
            self._pending, self._part = text[at + len(CLOSE) :], Part.GAP
            return text[:at].rstrip(NEWLINES)
        sure = text[: len(text) - begun(text, (CLOSE,))].rstrip(NEWLINES)
        self._pending = text[len(sure) :]
        self._begun = self._begun or bool(sure)
        return sure
