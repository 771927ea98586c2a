"""Tool calls in a text that comes in pieces. What is no call stays text, as the model wrote it.

However the text is cut, the pieces add up to the same. The arguments are handed on as they come once it is sure that
this is a call: its name has been read, and its arguments have begun.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import regex

from elastic.gateway.answer.formats import Format
from elastic.gateway.answer.json_text import JsonText
from elastic.gateway.text import begun

_NAME = r'"(?P<name>(?:[^"\\]|\\.)*)"'
_OBJECT_HEAD = regex.compile(
    rf'\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*{_NAME}\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class State(Enum):
    """What comes next."""

    START = auto()  # a call, or the first character of a text
    TEXT = auto()
    LEAD = auto()  # what comes before a call's JSON object
    OBJECT = auto()  # that object, with name and arguments
    ARGUMENTS = auto()
    REST = auto()  # of the object, after its arguments
    AFTER = auto()  # what ends a call, the next call, or text


@dataclass(frozen=True)
class Begin:
    """A call of this tool; its arguments follow."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments."""

    text: str


Event = str | Begin | Arguments  # a string is text


class ToolCalls:
    """Takes a text apart. `tools`: the names of those that there are."""

    def __init__(self, form: Format, tools: Container[str]) -> None:
        self._form, self._tools = form, tools
        self._state = State.START
        self._pending = ""  # what is not decided yet
        self._blank = ""  # before it, where a call has begun
        self._json = JsonText()
        self._object_at = self._seen = 0  # in `_pending`: where the object begins, and how far `_json` has read it
        self._floor = 0  # its nesting around the arguments
        self._out: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """What has become sure because of this text."""
        self._pending += text
        while self._pending and self._step():
            continue
        out, self._out = self._out, []
        return out

    def flush(self) -> list[Event]:
        """The text ends here: what is no whole call is text, and blanks after a call are left out."""
        left, self._pending = self._blank + self._pending, ""
        if self._state is State.REST or (self._state is State.AFTER and left.isspace()):
            return []
        return [left] if left else []

    def _step(self) -> bool:
        """Decide about what is pending, or part of it; False if more text is needed."""
        match self._state:
            case State.START:
                return self._between(self._form.first, ())
            case State.AFTER:
                return self._between(self._form.more, self._form.closers)
            case State.TEXT:
                return self._text()
            case State.LEAD:
                return self._lead()
            case State.OBJECT:
                return self._object()
            case State.ARGUMENTS:
                return self._arguments()
            case State.REST:
                return self._rest()

    def _between(self, here: Sequence[str], closers: Sequence[str]) -> bool:
        """Blanks and closers, up to an opener or a text. The blanks are part of a text only."""
        bare = self._pending.lstrip()
        openers = (*here, *self._form.openers)
        if bare.startswith(openers):
            self._blank = self._pending[: len(self._pending) - len(bare)]
            self._pending, self._state = bare, State.LEAD
        elif found := next((each for each in closers if bare.startswith(each)), ""):
            self._pending = bare[len(found) :]
        elif any(each.startswith(bare) for each in (*openers, *closers)):
            return False
        else:
            self._state = State.TEXT
        return True

    def _text(self) -> bool:
        text, openers = self._pending, self._form.openers
        places = [at for each in openers if (at := text.find(each)) >= 0]
        end = min(places) if places else len(text) - begun(text, openers)
        self._emit(text[:end])
        self._pending = text[end:]
        if places:
            self._state = State.LEAD
        return bool(places)

    def _lead(self) -> bool:
        found = self._form.lead.match(self._pending, partial=True)
        if found is None:
            return self._no_call()
        if found.partial:
            return False
        name = found.groupdict().get("name")
        if name is not None and not self._is_tool(name):
            return self._no_call()
        self._json, self._floor = JsonText(), 0
        if name is None:
            self._object_at = self._seen = found.end()
            self._state = State.OBJECT
        else:
            self._begin(name, found.end())
        return True

    def _object(self) -> bool:
        """Up to where its arguments begin; if they do not come after its name, up to its end."""
        found = _OBJECT_HEAD.match(self._pending, self._object_at)
        if found is not None:
            name = _text_of(found["name"])
            if not self._is_tool(name):
                return self._no_call()
            self._json.end(self._pending[: found.end()], self._seen)
            self._floor = 1
            self._begin(name, found.end())
            return True
        end = self._json.end(self._pending, self._seen)
        self._seen = len(self._pending)
        if end < 0:
            return False
        call = _whole_call(self._pending[self._object_at : end])
        if call is None or not self._is_tool(call[0]):
            return self._no_call()
        self._begin(call[0], end)
        self._out.append(Arguments(call[1]))
        self._state = State.AFTER
        return True

    def _begin(self, name: str, at: int) -> None:
        self._out.append(Begin(name))
        self._pending, self._blank, self._state = self._pending[at:], "", State.ARGUMENTS

    def _arguments(self) -> bool:
        end = self._json.end(self._pending, 0, self._floor)
        text = self._pending if end < 0 else self._pending[:end]
        self._out.append(Arguments(text))
        self._pending = self._pending[len(text) :]
        if end >= 0:
            self._state = State.REST if self._floor else State.AFTER
        return end >= 0

    def _rest(self) -> bool:
        end = self._json.end(self._pending, 0)
        self._pending = "" if end < 0 else self._pending[end:]
        if end >= 0:
            self._state = State.AFTER
        return end >= 0

    def _no_call(self) -> bool:
        """What is pending began like a call: it is text, in which a call may begin later."""
        openers = (*self._form.openers, *self._form.first, *self._form.more)
        opener = next(each for each in openers if self._pending.startswith(each))
        self._emit(self._blank + opener)
        self._blank = ""
        self._pending, self._state = self._pending[len(opener) :], State.TEXT
        return True

    def _is_tool(self, name: str) -> bool:
        return bool(name) and (self._form.marked or name in self._tools)

    def _emit(self, text: str) -> None:
        if text:
            self._out.append(text)


def _text_of(escaped: str) -> str:
    """A JSON string's text; empty if it is none."""
    try:
        return str(json.loads(f'"{escaped}"'))
    except ValueError:
        return ""


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of an object that has them in another order, or no arguments."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = found.get("name")
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, str) else None
