"""Reads an answer that comes in pieces: first its reasoning, then its text and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from elastic.gateway.answer.formats import Format
from elastic.gateway.answer.reasoning import CLOSE, OPEN, Reasoning
from elastic.gateway.answer.said import NOTHING, Call, Said, gathered
from elastic.gateway.answer.tool_calls import Begin, Event, ToolCalls


@dataclass(frozen=True)
class Expected:
    """What an answer may hold beside text."""

    form: Format | None = None
    tools: frozenset[str] = frozenset()
    parallel: bool = True  # False: only the first call counts
    reasoning: bool = False
    reasons_first: bool | None = None  # the answer begins with reasoning
    show_reasoning: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be special tokens, and has to be in the text all the same."""
        marks = (OPEN, CLOSE) if self.reasoning else ()
        return marks if self.form is None else (*marks, *self.form.marks)


class Reader:
    """`call_id`: the id of a call by its number."""

    def __init__(self, expected: Expected, call_id: Callable[[int], str]) -> None:
        self._expected, self._call_id = expected, call_id
        self._reasoning = Reasoning(expected.reasons_first) if expected.reasoning else None
        self._calls = None if expected.form is None else ToolCalls(expected.form, expected.tools)
        self._begun = 0  # calls

    @property
    def marks(self) -> tuple[str, ...]:
        """What the text must show, special token or not."""
        return self._expected.marks

    @property
    def called(self) -> bool:
        """Whether it has a tool call so far."""
        return self._begun > 0

    def push(self, text: str) -> Said:
        """What has become sure because of this text."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return self._said(reasoning, self._events(content))

    def flush(self) -> Said:
        """The rest: the answer ends here."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.flush()
        events = self._events(content)
        return self._said(reasoning, events if self._calls is None else [*events, *self._calls.flush()])

    def _events(self, content: str) -> list[Event]:
        if not content:
            return []
        return [content] if self._calls is None else self._calls.push(content)

    def _said(self, reasoning: str, events: Iterable[Event]) -> Said:
        shown = reasoning if self._expected.show_reasoning else ""
        return gathered([Said(reasoning=shown), *map(self._of, events)])

    def _of(self, event: Event) -> Said:
        if isinstance(event, str):
            return Said(event)
        number = self._begun
        if isinstance(event, Begin):
            self._begun += 1
        else:
            number -= 1
        if number and not self._expected.parallel:
            return NOTHING
        if isinstance(event, Begin):
            return Said(calls=(Call(number, self._call_id(number), event.name),))
        return Said(calls=(Call(number, arguments=event.text),))
