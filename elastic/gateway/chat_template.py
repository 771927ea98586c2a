"""A checkpoint's chat template: from a conversation to the prompt that transformers' `apply_chat_template` makes of it.

transformers builds its jinja environment in a private function, behind an import that takes a second; so it is built
again here, and compared with the original template by template in tests/unit/elastic/gateway/test_chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from membership.base.errors import RequestError

Message = Mapping[str, Any]
PROBE = "text-or-parts"  # a content to be found again in what a template makes of it
PROBE_ARGUMENTS = {"probe": 1}
NO_CONTENT: tuple[Message, ...] = ({}, {"content": None}, {"content": ""})
PROBE_SHOWN = ('"probe": 1', '"probe":1')
ASKED_FOR = ("tools", "reasoning_effort")  # variables that are refused where the template does not read them
# What a template runs into that was not made for this conversation: its author's mistake or the client's, never ours.
REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


class ChatTemplate:
    """A compiled template with the checkpoint's special tokens. Thread-safe."""

    def __init__(self, text: str, specials: Mapping[str, str]) -> None:
        self._text = text
        self._specials = dict(specials)

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The prompt up to where the assistant's answer begins; RequestError if the template refuses the messages."""
        try:
            return self._render([self._adapted(message) for message in messages], **variables)
        except REFUSALS as error:
            raise RequestError(f"the model's chat template refuses this: {error}", param="messages") from error

    def require(self, variables: Mapping[str, Any]) -> None:
        """RequestError if the template would leave out what was asked for: tools, an effort of reasoning."""
        for name in ASKED_FOR:
            if variables.get(name) and name not in self._variables:
                raise _left_out(name, name)

    def _render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **self._specials, **variables}
        return self._template.render({**given, "messages": messages})

    def _adapted(self, message: Message) -> Message:
        """The message as the template wants it: a role that it knows, a content of the kind that it reads."""
        adapted, content = dict(message), message.get("content")
        if message.get("role") == "developer" and "developer" not in self._text:
            adapted["role"] = "system"
        if isinstance(content, list) and self._reads_text and not self._reads_parts:
            adapted["content"] = "".join(part["text"] for part in content)
        elif isinstance(content, str) and self._reads_parts and not self._reads_text:
            adapted["content"] = [{"type": "text", "text": content}]
        if message.get("tool_calls"):
            self._adapt_calls(adapted)
        return adapted

    def _adapt_calls(self, message: dict[str, Any]) -> None:
        if self._calls is None:
            raise _left_out("the tool calls of messages", "messages")
        if not message.get("content"):
            message.pop("content", None)
            message |= self._calls.content
        if self._calls.parsed:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]

    @cached_property
    def _calls(self) -> _Calls | None:
        """How the template reads tool calls; None: not at all. What transformers does comes first."""
        found = []
        for form in (_Calls(content, parsed) for content in NO_CONTENT for parsed in (True, False)):
            arguments = PROBE_ARGUMENTS if form.parsed else json.dumps(PROBE_ARGUMENTS)
            function = {"name": PROBE, "arguments": arguments}
            call = {"id": "a1b2c3d4e", "type": "function", "function": function}
            asked = {"role": "user", "content": "x"}
            messages: list[Message] = [asked, {"role": "assistant", **form.content, "tool_calls": [call]}]
            try:
                text = self._render(messages)
            except REFUSALS:
                continue
            if PROBE in text and any(each in text for each in PROBE_SHOWN):
                found.append((form, "None" in text))
        return next((form for form, odd in found if not odd), found[-1][0] if found else None)

    @cached_property
    def _variables(self) -> set[str]:
        """What it reads beside its own."""
        try:
            return meta.find_undeclared_variables(self._environment.parse(self._text))
        except jinja2.TemplateError:  # to be reported when it is rendered
            return set(ASKED_FOR)

    @cached_property
    def _reads_text(self) -> bool:
        return self._reads(PROBE)

    @cached_property
    def _reads_parts(self) -> bool:
        return self._reads([{"type": "text", "text": PROBE}])

    def _reads(self, content: Any) -> bool:
        """Whether such a content comes out as text, rather than as a list in quotes, as an error or not at all."""
        user = {"role": "user", "content": content}
        return any(self._shows_probe(messages) for messages in ([user], [{**user, "role": "system"}, user]))

    def _shows_probe(self, messages: Sequence[Message]) -> bool:
        try:
            text = self._render(messages)
        except REFUSALS:
            return False
        return PROBE in text and not any(f"{quote}{PROBE}{quote}" in text for quote in "'\"")

    @cached_property
    def _template(self) -> jinja2.Template:
        return self._environment.from_string(self._text)

    @cached_property
    def _environment(self) -> jinja2.Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.globals["dict"] = _Dict()
        environment.globals["namespace"] = _Namespace
        return environment


class _Calls(NamedTuple):
    """What a template wants beside tool calls without a text, and whether it wants their arguments parsed."""

    content: Message
    parsed: bool


def _arguments(text: str) -> Any:
    """The arguments of a call as an object; none are an empty one.

    What a model wrote wrong stays as it is: agents send it back with what is wrong about it.
    """
    try:
        return json.loads(text or "{}")
    except ValueError:
        return _NoJson(text)


def _left_out(what: str, param: str) -> RequestError:
    message = f"the model's chat template has no place for {what}"
    return RequestError(message, param=param, code="unsupported_parameter", hint="say it in a message")


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant said, for training; here it is only what is in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's name and type for it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _NoJson(str):
    """Shown as it is."""

    __slots__ = ()


class _Dict:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja's, without names that begin with an underscore: those lead out of the sandbox."""

    def __init__(*args: Any, **entries: Any) -> None:  # as jinja's: `namespace(self=...)` works
        self, *rest = args
        names = dict(*rest, **entries)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name like {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja's escapes for HTML."""
    if isinstance(value, _NoJson):
        return value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
