"""The answers of /v1/responses: a whole response, or typed events, of which each item is begun, filled and ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from elastic.gateway.answer.said import Call, Said
from elastic.gateway.choice import Choice, Piece
from elastic.gateway.render import Answering, Json
from elastic.gateway.responses_schema import ResponsesRequest
from elastic.http_errors import message_of
from membership.base.errors import RequestError

PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class Item:
    """A piece of the output: reasoning, a message, or a function call. Its text, or its arguments, grow."""

    def __init__(self, kind: str, answer: str, index: int, call: Call | None = None) -> None:
        self.kind, self.index, self.call = kind, index, call
        self.id = f"{PREFIXES[kind]}{answer}_{index}"
        self._texts: list[str] = []

    def grow(self, text: str) -> Iterator[Json]:
        """More of it, if it is more."""
        if text:
            self._texts.append(text)
            yield self._event("delta", {"delta": text})

    def begin(self) -> Iterator[Json]:
        """Its first events."""
        yield self._whole("response.output_item.added", "in_progress")
        if self.call is None:
            yield self._part("response.content_part.added")

    def end(self) -> Iterator[Json]:
        """Its last events."""
        if self.call is not None:
            yield self._event("done", {"arguments": self._text, "name": self.call.name})
        else:
            yield self._event("done", {"text": self._text})
            yield self._part("response.content_part.done")
        yield self._whole("response.output_item.done", "completed")

    def shown(self, status: str) -> Json:
        """All of it."""
        item: Json = {"id": self.id, "type": self.kind, "status": status}
        if self.call is not None:
            return item | {"call_id": self.call.id, "name": self.call.name, "arguments": self._text}
        item["content"] = [] if status == "in_progress" else [self._shown_part()]
        more: Json = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return item | more

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _shown_part(self) -> Json:
        part: Json = {"type": PARTS[self.kind], "text": self._text}
        return part | {"annotations": [], "logprobs": []} if self.kind == "message" else part

    def _whole(self, name: str, status: str) -> Json:
        return {"type": name, "output_index": self.index, "item": self.shown(status)}

    def _part(self, name: str) -> Json:
        return {"type": name, **self._where(), "part": self._shown_part()}

    def _event(self, name: str, more: Json) -> Json:
        if self.call is not None:
            return {"type": f"response.function_call_arguments.{name}", **self._where(), **more}
        logprobs: Json = {"logprobs": []} if self.kind == "message" else {}
        return {"type": f"response.{PARTS[self.kind]}.{name}", **self._where(), **more, **logprobs}

    def _where(self) -> Json:
        at = {"item_id": self.id, "output_index": self.index}
        return at if self.call is not None else at | {"content_index": 0}


class Output:
    """The items so far, of which the last one is open."""

    def __init__(self, answer: str) -> None:
        self.items: list[Item] = []
        self._answer = answer

    def push(self, said: Said) -> Iterator[Json]:
        """The events of a piece. What belongs to the call that is open comes first."""
        last = self.items[-1] if self.items else None
        fresh = []
        for call in said.calls:
            if call.name or last is None:
                fresh.append(call)
            else:
                yield from last.grow(call.arguments)
        for kind, text in (("reasoning", said.reasoning), ("message", said.content)):
            if text:
                yield from self._grow(kind, text)
        for call in fresh:
            yield from self._begin("function_call", call)
            yield from self.items[-1].grow(call.arguments)

    def end(self) -> Iterator[Json]:
        """The events of its end. An answer without any item is an empty message."""
        if not self.items:
            yield from self._begin("message")
        yield from self.items[-1].end()

    def _grow(self, kind: str, text: str) -> Iterator[Json]:
        if not self.items or self.items[-1].kind != kind:
            yield from self._begin(kind)
        yield from self.items[-1].grow(text)

    def _begin(self, kind: str, call: Call | None = None) -> Iterator[Json]:
        if self.items:
            yield from self.items[-1].end()
        self.items.append(Item(kind, self._answer, len(self.items), call))
        yield from self.items[-1].begin()


class ResponseRenderer(Answering):
    """/v1/responses."""

    def __init__(self, answer: str, asked: ResponsesRequest, created: int) -> None:
        self.id = f"resp_{answer}"
        self._model = asked.model
        self._created = created
        self._asked = asked
        self._output = Output(answer)
        self._events = 0
        self._begun = False

    def whole(self, prompt_tokens: int, choices: Sequence[Choice]) -> Json:
        """The response in one go."""
        (choice,) = choices
        for said in choice.pieces:
            for _ in self._output.push(said):
                continue
        for _ in self._output.end():
            continue
        return self._ended(prompt_tokens, choice)

    def said(self, index: int, piece: Piece, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """A piece's events."""
        events = []
        if not self._begun:
            self._begun = True
            begun = self._response("in_progress")
            events = [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
        return self._written([*events, *self._output.push(piece.said)])

    def ended(self, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """The last events."""
        events = list(self._output.end())
        response = self._ended(prompt_tokens, choices[0])
        return self._written([*events, {"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: RequestError) -> bytes:
        """The event of an error, which is the last one."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response = self._response("failed") | {"error": {"code": code, "message": message_of(error)}}
        return self._written([{"type": "response.failed", "response": response}])

    def _ended(self, prompt_tokens: int, choice: Choice) -> Json:
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.cached, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + choice.tokens,
        }
        output = [item.shown("completed") for item in self._output.items]
        if status == "incomplete":
            output[-1]["status"] = status
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status) | {"output": output, "usage": usage, "incomplete_details": cut}

    def _response(self, status: str) -> Json:
        asked = self._asked
        same = ("instructions", "max_output_tokens", "parallel_tool_calls", "temperature", "top_p", "metadata")
        form: Any = asked.text.format if asked.text else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "store": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "tools": [tool.model_dump() for tool in asked.tools],
            "tool_choice": asked.tool_choice or "auto",
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            **{name: getattr(asked, name) for name in same},
        }

    def _written(self, events: Sequence[Json]) -> bytes:
        written = b""
        for event in events:
            data = msgspec.json.encode(event | {"sequence_number": self._events})
            written += b"event: " + str(event["type"]).encode() + b"\ndata: " + data + b"\n\n"
            self._events += 1
        return written
