"""What clients may ask for: OpenAI's request shapes, checked and capped while they are parsed.

A field we do not know is an error that names it: ignoring it would silently give another answer than was asked for. A
field that OpenAI has and we do not offer is accepted at the value that means "off", and refused otherwise.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from membership.base.errors import RequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_N = 16
MAX_CHOICES = 64  # over all prompts of a request
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_TOKENS = 2**31 - 1  # of a request's field; the context is the limit
MAX_SEED = 2**63 - 1
MAX_ID = 2**31 - 1  # of a token; whatever is sent to the engine must fit into 64 bits

TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
OFF: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "reasoning_effort": ("none",),
}


class Shape(BaseModel):
    """Base: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Shape):
    """`include_usage`: one more chunk at the end, with the usage."""

    include_usage: bool = False
    include_obfuscation: bool = False


class CommonRequest(Shape):
    """What both APIs share."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_ID)
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: list[StopString] = Field(default=[], max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOPS)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1024)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, data: Any) -> Any:
        """Null means "not given" everywhere; switched-off features are dropped, switched-on ones refused."""
        if not isinstance(data, dict):
            return data
        for name, harmless in OFF.items():
            value = data.get(name)
            if value is not None and value not in harmless:
                raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
        return {name: value for name, value in data.items() if value is not None and name not in OFF}

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _consistent(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_logprobs(self) -> int:
        """-1: none; n: the chosen token's and the n likeliest ones'."""
        return -1


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: (
        str | TokenIds | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _choices(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise RequestError("best_of other than n is not supported", param="best_of", code="unsupported_parameter")
        if not self.prompts:
            raise RequestError("prompt must not be empty", param="prompt")
        if len(self.prompts) * self.n > MAX_CHOICES:
            message = f"{len(self.prompts)} prompts x n={self.n} are more than {MAX_CHOICES} choices"
            raise RequestError(message, param="prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    @property
    def wanted_logprobs(self) -> int:
        """As asked for."""
        return -1 if self.logprobs is None else self.logprobs


class TextPart(Shape):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Shape):
    """One message of a conversation: text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(default=None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Clients send back the assistant's own messages, with null for what they do not use."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    def plain(self) -> dict[str, Any]:
        """As chat templates get it: what was said, in plain types."""
        return self.model_dump(exclude_none=True)

    @property
    def characters(self) -> int:
        """Length of its text."""
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, formerly `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int:
        """As asked for."""
        return (self.top_logprobs or 0) if self.logprobs else -1


R = TypeVar("R", bound=Shape)


def parse(body: bytes, shape: type[R]) -> R:
    """The request in `body`; RequestError names the first field that is wrong, and how."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=True)[0]
    where = [str(part) for part in first["loc"]]
    param = where[0] if where else ""
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        path = ".".join(where)
        return RequestError(f"unknown field: {path}", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        path = ".".join(where)
        return RequestError(f"{path} is required", param=path, code="missing_required_parameter")
    if param == "prompt":  # one line rather than one per alternative
        return RequestError("prompt must be a string, strings, token ids, or lists of token ids", param=param)
    if "content" in where:
        where = where[: where.index("content") + 1]
        return RequestError(f"{'.'.join(where)} must be a string or a list of text parts", param=".".join(where))
    path = ".".join(where)
    return RequestError(f"{path}: {first['msg']}" if path else str(first["msg"]), param=path, code="invalid_value")


def seed_for(seed: int, choice: int) -> int:
    """The seed of one of several choices: the first keeps the client's, the others get a hash of seed and choice.

    A hash is beyond what a client may ask for, except by a negative seed, whose first choice therefore gets one, too.
    """
    if choice == 0 and seed >= 0:
        return seed
    data = seed.to_bytes(8, "little", signed=True) + choice.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") | (MAX_SEED + 1)
