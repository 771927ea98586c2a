"""OpenAI's response shapes for both APIs: a whole response, a stream's chunks, log-probabilities, usage, errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import msgspec

from elastic.gateway.answer.said import NOTHING, Call, Said
from elastic.gateway.choice import Choice, Piece
from elastic.gateway.prompt_echo import TokenEntry
from elastic.gateway.tokenizer import Tokenizer
from elastic.http_errors import message_of
from membership.base.errors import RequestError
from workers.protocol.messages import TokenLogprobs

Json = dict[str, Any]
encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


class UsageShown(NamedTuple):
    """Where a stream has the usage: in a chunk at its end; in every chunk, so far."""

    at_end: bool = False
    in_each: bool = False


class Answering(ABC):
    """How a request is answered: in one go, or by events."""

    id: str

    @abstractmethod
    def whole(self, prompt_tokens: int, choices: Sequence[Choice]) -> Json:
        """The response in one go."""

    @abstractmethod
    def said(self, index: int, piece: Piece, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """The events of a choice's piece, if it has any."""

    @abstractmethod
    def ended(self, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """The last events."""

    @abstractmethod
    def failed(self, error: RequestError) -> bytes:
        """The last events of a stream that breaks off."""


class Renderer(Answering):
    """One response's shape: its id, model and time are the same in every chunk."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self, tokenizer: Tokenizer, response_id: str, model: str, created: int, usage_shown: UsageShown
    ) -> None:
        self.id = response_id
        self._tokenizer = tokenizer
        self._model = model
        self._created = created
        self._usage_shown = usage_shown
        self._opened: set[int] = set()  # choices of which a chunk was sent

    def said(self, index: int, piece: Piece, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """A piece's chunk, after the one that opens its choice."""
        opening = b""
        if index not in self._opened:
            self._opened.add(index)
            if begins := self.opening(index):
                opening = self._chunk(begins, prompt_tokens, choices)
        if not (self._shown(piece) or piece.entries or piece.finish_reason):
            return opening
        return opening + self._chunk(self._chunk_choice(index, piece), prompt_tokens, choices)

    def ended(self, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """The usage, if it was asked for, and the end."""
        if not self._usage_shown.at_end:
            return DONE
        return event(self._envelope(self.chunk_object, []) | {"usage": usage(prompt_tokens, choices)}) + DONE

    def failed(self, error: RequestError) -> bytes:
        """The error, and the end."""
        return event(error_body(error)) + DONE

    def opening(self, index: int) -> Json | None:
        """What the chunk that begins a choice has of it, if this API has one."""
        return None

    def _chunk(self, choice: Json, prompt_tokens: int, choices: Sequence[Choice]) -> bytes:
        """An event with a choice's news. There is one per token, so what is the same in all of them is encoded once."""
        end = b"}\n\n"
        if self._usage_shown.in_each:
            end = b',"usage":' + encode(usage(prompt_tokens, choices)) + end
        elif self._usage_shown.at_end:
            end = b',"usage":null' + end
        return self._chunk_head + encode(choice) + b"]" + end

    @cached_property
    def _chunk_head(self) -> bytes:
        whole = event(self._envelope(self.chunk_object, []))
        return whole[: whole.rindex(b'"choices":[') + len(b'"choices":[')]

    def _shown(self, piece: Piece) -> bool:
        """Whether it has something to say."""
        return bool(piece.text)

    def whole(self, prompt_tokens: int, choices: Sequence[Choice]) -> Json:
        """The response in one go."""
        found = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return self._envelope(self.whole_object, found) | {"usage": usage(prompt_tokens, choices)}

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        envelope = {
            "id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices,
        }  # fmt: skip
        return envelope | {"usage": None} if self._usage_shown.at_end else envelope

    @abstractmethod
    def _chunk_choice(self, index: int, piece: Piece) -> Json: ...

    @abstractmethod
    def _whole_choice(self, index: int, choice: Choice) -> Json: ...

    def _prompt_logprobs(self, choice: Choice) -> Json:
        """In vLLM's shape, if they were asked for: by token id, the prompt's own one first; none of the first token."""
        if choice.prompt_logprobs is None:
            return {}
        pairs = zip(choice.prompt[1:], choice.prompt_logprobs, strict=True)
        return {"prompt_logprobs": [None, *(self._ranked(token, logprobs) for token, logprobs in pairs)]}

    def _ranked(self, token: int, logprobs: TokenLogprobs) -> Json:
        others = ((each, value, rank) for rank, (each, value) in enumerate(logprobs.top, 1) if each != token)
        return {
            str(each): {"logprob": value, "rank": rank, "decoded_token": self._name(each)}
            for each, value, rank in ((token, logprobs.logprob, logprobs.rank), *others)
        }

    def _name(self, token: int) -> str:
        """A token as text; what is not whole characters is written as OpenAI writes it."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionRenderer(Renderer):
    """/v1/completions."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def _chunk_choice(self, index: int, piece: Piece) -> Json:
        return self._choice(index, piece.text, piece.entries, piece.finish_reason)

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        found = self._choice(index, choice.text, choice.entries, choice.finish_reason)
        return found | self._prompt_logprobs(choice)

    def _choice(self, index: int, text: str, entries: Sequence[TokenEntry], finish_reason: str) -> Json:
        logprobs = self._logprobs(entries) if entries else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason or None}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json:
        return {
            "text_offset": [entry.offset for entry in entries],
            "token_logprobs": [entry.logprobs.logprob if entry.logprobs else None for entry in entries],
            "tokens": [self._name(entry.token) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
        }

    def _top(self, entry: TokenEntry) -> dict[str, float] | None:
        """The likeliest tokens by their text and, as OpenAI has it, the chosen one among them."""
        if entry.logprobs is None:
            return None
        top = {self._name(token): value for token, value in reversed(entry.logprobs.top)}
        return top | {self._name(entry.token): entry.logprobs.logprob}


class ChatRenderer(Renderer):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json:
        """The role comes first."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, prompt_tokens: int, choices: Sequence[Choice]) -> Json:
        """With the prompt's log probabilities beside the choices."""
        return super().whole(prompt_tokens, choices) | self._prompt_logprobs(choices[0])

    def _shown(self, piece: Piece) -> bool:
        return piece.said != NOTHING

    def _chunk_choice(self, index: int, piece: Piece) -> Json:
        return {
            "index": index,
            "delta": _delta(piece.said),
            "logprobs": self._logprobs(piece.entries),
            "finish_reason": _reason(piece.finish_reason, called=piece.called) or None,
        }

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": _message(choice.said),
            "logprobs": self._logprobs(choice.entries),
            "finish_reason": _reason(choice.finish_reason, called=choice.called),
        }

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json | None:
        if not entries:
            return None
        content = [
            self._token(entry.token, entry.logprobs.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in entry.logprobs.top]}
            for entry in entries
            if entry.logprobs is not None
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self._tokenizer.token_bytes(token))}


def _message(said: Said) -> Json:
    """A whole answer."""
    message: Json = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["content"] = said.content or None
        message["tool_calls"] = [_called(call) for call in said.calls]
    return message


def _delta(said: Said) -> Json:
    """What a piece adds to it."""
    delta: Json = {"content": said.content} if said.content else {}
    if said.reasoning:
        delta["reasoning_content"] = said.reasoning
    if said.calls:
        delta["tool_calls"] = [{"index": call.index} | _called(call) for call in said.calls]
    return delta


def _called(call: Call) -> Json:
    """A tool call, or what is new of it: its name comes once."""
    if not call.name:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(finish_reason: str, *, called: bool) -> str:
    return "tool_calls" if called and finish_reason == "stop" else finish_reason


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> Json:
    """Tokens read and written."""
    written = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in choices)},
    }


def error_body(error: RequestError) -> Json:
    """OpenAI's error object."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {"message": message_of(error), "type": kind, "param": error.param or None, "code": error.code or None}
    }


def event(data: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(data) + b"\n\n"
