"""What clients may ask for: OpenAI's request shapes, checked and capped while they are parsed.

What is not here is in `fields.py`, or an error that names it.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from elastic.gateway.fields import Note, Place, without_extras
from elastic.gateway.tools import MAX_NAME, Tool, ToolCall, ToolChoice, Tools, forced_tools, template_variables
from membership.base.errors import RequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_N = 16
MAX_CHOICES = 64  # over all prompts of a request
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STRUCTURED_CHOICES = 1024
MAX_BAD_WORDS = 256
MAX_MESSAGES = 2048
MAX_TOKENS = 2**31 - 1  # of a request's field; the context is the limit
MAX_SEED = 2**63 - 1
MAX_ID = 2**31 - 1  # of a token; whatever is sent to the engine must fit into 64 bits

ALTERNATIVES = {  # fields of several types: one line rather than one for each type
    "prompt": "a string, strings, token ids, or lists of token ids",
    "messages.content": "a string or a list of text parts",
    "input": f"a string or a list of 1 to {MAX_MESSAGES} items, which are objects",
    "tool_choice": "a string or an object",
    "guided_json": "an object or a string",
    "structured_outputs.json": "an object or a string",
}

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_STRUCTURED_CHOICES)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=MAX_ID)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class Shape(BaseModel):
    """Base: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class OpenShape(Shape):
    """A shape of which clients send more than it has: see `fields.py`. Null means "not given" everywhere."""

    place: ClassVar[Place]

    @model_validator(mode="before")
    @classmethod
    def _without_extras(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        given = without_extras(data, cls.place, cls.model_fields, info.context or _unnoted)
        return {name: _whole(value) if cls._is_whole(name) else value for name, value in given.items()}

    @classmethod
    def _is_whole(cls, name: str) -> bool:
        annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
        return annotation is int or int in get_args(annotation)


def _whole(value: Any) -> Any:
    """JavaScript and others write a whole number as 10.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unnoted(name: str) -> None:
    """An ignored field that is not reported."""


class StreamOptions(OpenShape):
    """`include_usage`: one more chunk at the end, with the usage. `continuous_usage_stats`: so far, in each chunk."""

    place = Place.STREAM_OPTIONS
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Shape):
    """The schema of OpenAI's `response_format`."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Shape):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(OpenShape):
    """vLLM's: one form that the answer must have."""

    place = Place.STRUCTURED
    schema_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampled(OpenShape):
    """How tokens are chosen, and where an answer ends: the same for all APIs."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_ID)
    min_p: float = Field(default=0.0, ge=0, le=1)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[str, Bias] = Field(default={}, max_length=MAX_BIASES)
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: list[StopString] = Field(default=[], max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=MAX_STOPS)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        """One or several; an empty one stops nothing."""
        given = [stop] if isinstance(stop, str) else stop
        return [each for each in given if each != ""] if isinstance(given, list) else given


class CommonRequest(Sampled):
    """What completions and chats share."""

    place = Place.REQUEST

    model: str
    n: int = Field(default=1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    allowed_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    bad_words: list[StopString] = Field(default=[], max_length=MAX_BAD_WORDS)
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> CommonRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs are not streamed", param="prompt_logprobs", hint="leave out stream")
        if self.max_tokens == 0 and not self.echoed and self.prompt_logprobs is None:
            hint = "/v1/completions scores a prompt with echo and max_tokens 0"
            raise RequestError("max_tokens must be at least 1", param="max_tokens", code="invalid_value", hint=hint)
        return self

    @property
    def echoed(self) -> bool:
        """Whether the answer begins with the prompt."""
        return False

    @property
    def wanted_prompt_logprobs(self) -> int:
        """As `wanted_logprobs`, of the prompt."""
        echoed = self.wanted_logprobs if self.echoed else -1
        return max(echoed, -1 if self.prompt_logprobs is None else self.prompt_logprobs)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

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
    echo: bool = False
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
    def echoed(self) -> bool:
        """As asked for."""
        return self.echo

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


class TextPart(OpenShape):
    """A piece of a message."""

    place = Place.PART
    type: Literal["text"]
    text: str


class Message(OpenShape):
    """One message of a conversation: text and tool calls. Clients send the assistant's back, with all their fields."""

    place = Place.MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=MAX_NAME)
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_MESSAGES)
    tool_call_id: str | None = Field(default=None, max_length=MAX_NAME)
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise RequestError("messages: tool_calls are the assistant's", param="messages")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.thought)):
            message = "messages.content is required"
            raise RequestError(message, param="messages", code="missing_required_parameter")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates get it: what was said, in plain types."""
        plain = self.model_dump(exclude_none=True, exclude={"tool_calls", "reasoning_content", "reasoning"})
        if self.thought:  # under both names, as transformers does
            plain |= {"thinking": self.thought, "reasoning_content": self.thought}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return plain

    @property
    def thought(self) -> str:
        """The reasoning that it brings."""
        return self.reasoning_content or self.reasoning or ""

    @property
    def characters(self) -> int:
        """Length of its text."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        calls = [each for call in self.tool_calls or () for each in (call.function.name, call.function.arguments)]
        return sum(map(len, (*texts, *calls, self.thought)))


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Tools = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = Field(default=None, max_length=MAX_NAME)
    chat_template_kwargs: dict[str, Any] = {}
    include_reasoning: bool = True
    separate_reasoning: bool = True

    @model_validator(mode="after")
    def _logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _tools(self) -> ChatRequest:
        forced_tools(self.tool_choice, self.tools)
        return self

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which one has to be called."""
        return forced_tools(self.tool_choice, self.tools)

    @property
    def most_calls(self) -> int | None:
        """How many calls there may be; None: any number."""
        return None if self.tool_choice == "required" and self.parallel_tool_calls else 1

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        effort = None if self.reasoning_effort == "none" else self.reasoning_effort
        return template_variables(self.tools, self.tool_choice, self.chat_template_kwargs, effort)

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may call them."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, formerly `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int:
        """As asked for."""
        return (self.top_logprobs or 0) if self.logprobs else -1


R = TypeVar("R", bound=Shape)


def parse(body: bytes, shape: type[R], note: Note = _unnoted) -> R:
    """The request in `body`; RequestError names the first field that is wrong, and how.

    `note` gets the names of fields that are ignored. Files that were written on Windows begin with a byte order mark.
    """
    try:
        return shape.model_validate_json(body.removeprefix(BOM_UTF8), context=note)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=True)[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        path = ".".join(where)
        return RequestError(f"unknown field: {path}", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        path = ".".join(where)
        return RequestError(f"{path} is required", param=path, code="missing_required_parameter")
    for each in error.errors(include_url=False, include_context=False):
        at = [str(part) for part in each["loc"]]
        place = _within(at, ["messages", "content"])
        if place is not None and at[-1] == "type" and isinstance(each["input"], str):
            return RequestError(f"{place}: {only_text(each['input'])}", param=place, code="unsupported_value")
    for field, kinds in ALTERNATIVES.items():
        if (place := _within(where, field.split("."))) is not None:
            return RequestError(f"{place} must be {kinds}", param=place, code="invalid_value")
    path = ".".join(where)
    return RequestError(f"{path}: {first['msg']}" if path else str(first["msg"]), param=path, code="invalid_value")


def only_text(kind: str) -> str:
    """Why a part of a message is refused."""
    return f"a part of type {kind[:64]!r} is not supported: this serves text models, so send a string or text parts"


def _within(where: Sequence[str], field: Sequence[str]) -> str | None:
    """The path of this field, if the error is in it: `messages.2.content`."""
    names = [(at, part) for at, part in enumerate(where) if not part.isdigit()][: len(field)]
    return ".".join(where[: names[-1][0] + 1]) if [part for _, part in names] == list(field) else None


def seed_for(seed: int, choice: int) -> int:
    """The seed of one of several choices: the first keeps the client's, the others get a hash of seed and choice.

    A hash is beyond what a client may ask for, except by a negative seed, whose first choice therefore gets one, too.
    """
    if choice == 0 and seed >= 0:
        return seed
    data = seed.to_bytes(8, "little", signed=True) + choice.to_bytes(8, "little")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") | (MAX_SEED + 1)
