"""POST /v1/responses: OpenAI's newer shape of a chat, turned into a `ChatRequest`. Nothing is stored here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from elastic.gateway.fields import Note, Place
from elastic.gateway.schema import MAX_MESSAGES, MAX_TOKENS, ChatRequest, OpenShape, Sampled, Shape, only_text, parse
from elastic.gateway.tools import MAX_NAME, MAX_TOOLS
from membership.base.errors import RequestError

TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
Json = dict[str, Any]


class TextFormat(Shape):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(default=None, alias="schema")
    strict: bool | None = None


class Text(OpenShape):
    """How the answer's text is."""

    place = Place.TEXT
    format: TextFormat | None = None


class Thinking(OpenShape):
    """How much to reason."""

    place = Place.REASONING
    effort: str | None = Field(default=None, max_length=MAX_NAME)


class FunctionTool(Shape):
    """A tool of the client's."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ResponsesRequest(Sampled):
    """POST /v1/responses."""

    place = Place.RESPONSES

    model: str
    input: str | Annotated[list[Json], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool = True
    text: Text | None = None
    reasoning: Thinking | None = None
    chat_template_kwargs: Json = Field(default={})
    include_reasoning: bool = True
    metadata: dict[str, str] = Field(default={})
    stream: bool = False

    def as_chat(self, note: Note) -> ChatRequest:
        """The same for /v1/chat/completions. RequestError names what it cannot be."""
        said = self.model_fields_set
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = self.input if isinstance(self.input, list) else [{"role": "user", "content": self.input}]
        chat: Json = {"model": self.model, "messages": [*messages, *_messages(items)], "stream": self.stream}
        chat |= self.model_dump(include=set(Sampled.model_fields) & said, exclude_none=True, by_alias=True)
        chat |= {"max_completion_tokens": self.max_output_tokens, "include_reasoning": self.include_reasoning}
        chat |= {"tools": [_nested(tool) for tool in self.tools], "parallel_tool_calls": self.parallel_tool_calls}
        chat |= {"tool_choice": _choice(self.tool_choice), "chat_template_kwargs": self.chat_template_kwargs}
        chat |= {"reasoning_effort": self.reasoning and self.reasoning.effort}
        chat |= {"response_format": _form(self.text.format) if self.text and self.text.format else None}
        try:
            return parse(msgspec.json.encode(chat), ChatRequest, note)
        except RequestError as error:
            if not error.param.startswith("messages"):
                raise
            message = f"input: as a chat it is refused: {error}"
            raise RequestError(message, param="input", code=error.code, hint=error.hint) from error


def _nested(tool: FunctionTool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)}


def _choice(choice: str | Json | None) -> str | Json | None:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _form(form: TextFormat) -> Json:
    if form.type != "json_schema":
        return {"type": form.type}
    schema = {"name": form.name or "schema", "schema": form.schema_}
    return {"type": form.type, "json_schema": schema}


def _messages(items: list[Json]) -> Iterator[Json]:
    """The messages of a conversation's items: what an assistant thought, said and called in a row is one message."""
    turn: Json = {}
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant" and not turn.get("tool_calls"):
            turn["content"] = turn.get("content", "") + _text(item.get("content"), number)
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _text(parts, number)
        elif kind == "function_call":
            called = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            call = {"id": item.get("call_id"), "type": "function", "function": called}
            turn["tool_calls"] = [*turn.get("tool_calls", ()), call]
        else:
            if turn:
                yield {"role": "assistant", **turn}
                turn = {}
            yield _other(item, kind, number)
    if turn:
        yield {"role": "assistant", **turn}


def _other(item: Json, kind: str, number: int) -> Json:
    if kind == "message":
        return {"role": item.get("role"), "content": _text(item.get("content"), number)}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"), number)}
    raise RequestError(
        f"input.{number}: items of type {kind!r} are not supported",
        param="input",
        code="unsupported_parameter",
        hint="nothing is stored here: send messages, function calls and their outputs themselves",
    )


def _text(content: Any, number: int) -> str:
    """The text of a content: a string, or text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in TEXT_PARTS:
            raise RequestError(f"input.{number}: {only_text(kind)}", param="input", code="unsupported_value")
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(f"input.{number}: its content must be a string or a list of text parts", param="input")
    return "".join(part["text"] for part in parts)
