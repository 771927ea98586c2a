"""Where a JSON object ends that comes in pieces."""

from __future__ import annotations

import re

_STRUCTURE = re.compile(r'["\\{}\[\]]')


class JsonText:
    """Follows the nesting of a JSON text; what is in strings does not count."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False  # by the last character of the text so far

    def end(self, text: str, start: int, depth: int = 0) -> int:
        """Read on from `start` to where the nesting falls back to `depth`: the index after it; -1 if it does not."""
        resume = start + self._escaped
        self._escaped = False
        for found in _STRUCTURE.finditer(text, start):
            at, char = found.start(), found[0]
            if at < resume:
                continue
            if self._in_string:
                if char == "\\":
                    resume = at + 2
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= depth:
                    return at + 1
        self._escaped = resume > len(text)
        return -1
