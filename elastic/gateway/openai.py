"""The OpenAI API: a request becomes one engine request per choice, their tokens become a response or a stream.

A stream sends its headers with its first event, so whatever goes wrong before that is a plain HTTP error; afterwards
it is an error event, never a bare end of the stream.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from msgspec.structs import replace

from elastic.gateway.access import Visit, visit_of
from elastic.gateway.answer.formats import CHOSEN, Format
from elastic.gateway.answer.reader import Expected, Reader
from elastic.gateway.answer.reasoning import reasons_first
from elastic.gateway.answer.said import call_id
from elastic.gateway.choice import Choice, Extent, Piece
from elastic.gateway.engine_link import EngineLink, EngineRefusal, Generation
from elastic.gateway.fields import Note, NotedOnce
from elastic.gateway.http import EventStream, Shortcut, internal_error, json_response, read_body, unless_gone
from elastic.gateway.journal import Delta
from elastic.gateway.journal import Request as Sequence
from elastic.gateway.metrics import GatewayMetrics, StreamTimer
from elastic.gateway.render import Answering, ChatRenderer, CompletionRenderer, Json, Renderer, UsageShown
from elastic.gateway.responses import ResponseRenderer
from elastic.gateway.responses_schema import ResponsesRequest
from elastic.gateway.sampling import sampling_of
from elastic.gateway.schema import MAX_SEED, ChatRequest, CommonRequest, CompletionRequest, Message, parse, seed_for
from elastic.gateway.structured import Forms
from elastic.gateway.text import StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from membership.base.enums import ReasoningParser
from membership.base.errors import RequestError
from membership.store.records import ClusterConfig
from workers.model.text_files import SamplingDefaults
from workers.protocol.messages import Sampling

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
PROMPT_END = 8  # tokens, more than <think> and what surrounds it
OPENAI_SAMPLING = SamplingDefaults()

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Service:
    """What the routes need to answer."""

    config: ClusterConfig
    tokenizer: Tokenizer
    link: EngineLink
    metrics: GatewayMetrics
    started: float
    sampling: SamplingDefaults = OPENAI_SAMPLING
    tool_calls: Format | None = None  # how the model writes them
    reasoning: ReasoningParser = ReasoningParser.NONE
    now: Callable[[], float] = time.time
    ignored: Note = field(default_factory=NotedOnce)
    random_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED)

    @cached_property
    def forms(self) -> Forms:
        """Of structured output."""
        return Forms(self.tokenizer.spells_bytes, self.config.eos_token_ids)

    @property
    def context(self) -> int:
        """How many tokens a sequence may have: the model's limit, or what one rank's KV cache holds."""
        return min(self.config.max_model_len, self.config.kv_blocks * self.config.block_size)


@dataclass(frozen=True)
class Job:
    """A parsed request: what to run, and how to answer."""

    sequences: list[Sequence]
    choices: list[Choice]
    renderer: Answering
    prompt_tokens: int
    visit: Visit


def add_routes(app: FastAPI, service: Service) -> None:
    """Serve /v1/models, /v1/completions, /v1/chat/completions and /v1/responses."""

    def described(name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "elastic-ep",
            "max_model_len": service.context,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [described(name) for name in service.config.model_names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        require_model(service, name)
        return json_response(described(name))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(await read_body(request), CompletionRequest, service.ignored)
        require_model(service, asked.model)
        prompts = [await token_ids(service, prompt) for prompt in asked.prompts]
        sampling = await _sampling(service, asked)
        job = _job(service, asked, prompts, sampling, CompletionRenderer, visit_of(request))
        return await _answer(request, service, asked, job)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(await read_body(request), ChatRequest, service.ignored)
        require_model(service, asked.model)
        prompt = await chat_token_ids(service, asked.messages, asked.variables)
        sampling = await _sampling(service, asked)
        job = _job(service, asked, [prompt], sampling, ChatRenderer, visit_of(request))
        return await _answer(request, service, asked, job)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        asked = parse(await read_body(request), ResponsesRequest, service.ignored)
        require_model(service, asked.model)
        chat = asked.as_chat(service.ignored)
        prompt = await chat_token_ids(service, chat.messages, chat.variables)
        sampling = await _sampling(service, chat)
        job = _job(service, chat, [prompt], sampling, ChatRenderer, visit_of(request))
        answer = job.renderer.id.removeprefix(ChatRenderer.id_prefix)
        renderer = ResponseRenderer(answer, asked, int(service.now()))
        return await _answer(request, service, chat, dataclasses.replace(job, renderer=renderer))


def require_model(service: Service, name: str) -> None:
    """RequestError (404) unless the model is served under this name."""
    if name not in service.config.model_names:
        message = f"the model {name!r} does not exist here; this is {service.config.served_model_name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")


async def chat_token_ids(service: Service, messages: list[Message], variables: dict[str, Any]) -> list[int]:
    """A conversation as the model gets it. `variables`: what the chat template gets beside it."""
    length = sum(message.characters for message in messages) + len(msgspec.json.encode(variables))
    if length > service.context * service.tokenizer.longest_token:
        raise _too_long(f"it has {length} characters", service, "messages")
    plain = [message.plain() for message in messages]
    return known_tokens(service, await asyncio.to_thread(service.tokenizer.encode_chat, plain, variables), "messages")


async def token_ids(service: Service, prompt: str | list[int], *, special: bool = True) -> list[int]:
    """A prompt as the model gets it. `special`: with the tokens that it wants around a text."""
    if isinstance(prompt, str):
        if len(prompt) > service.context * service.tokenizer.longest_token:  # not worth seconds of tokenizing
            raise _too_long(f"it has {len(prompt)} characters", service, "prompt")
        prompt = await asyncio.to_thread(service.tokenizer.encode, prompt, special=special)
    return known_tokens(service, prompt, "prompt")


def known_tokens(service: Service, prompt: list[int], field: str) -> list[int]:
    """The prompt; RequestError if the model has no such token. A tokenizer may have more than its model."""
    size = service.config.vocab_size or service.tokenizer.vocab_size
    beyond = next((token for token in prompt if token >= size), None)
    if beyond is not None:
        raise RequestError(f"{field}: token id {beyond} is not in the vocabulary of {size}", param=field)
    return prompt


async def _sampling(service: Service, asked: CommonRequest) -> Sampling:
    size, ends = service.config.vocab_size or service.tokenizer.vocab_size, service.config.eos_token_ids
    return sampling_of(asked, service.sampling, service.tokenizer, size, ends, await service.forms.grammar(asked))


def _job(
    service: Service,
    asked: CommonRequest,
    prompts: list[list[int]],
    sampling: Sampling,
    kind: type[Renderer],
    visit: Visit,
) -> Job:
    """One sequence and one choice per prompt and n, in OpenAI's order: all choices of the first prompt first."""
    shown = UsageShown(asked.include_usage, asked.continuous_usage)
    response_id = kind.id_prefix + secrets.token_hex(12)
    seed = service.random_seed() if asked.seed is None else asked.seed
    job = Job(
        sequences=[],
        choices=[],
        renderer=kind(service.tokenizer, response_id, asked.model, int(service.now()), shown),
        prompt_tokens=sum(map(len, prompts)),
        visit=visit,
    )
    for prompt in prompts:
        expects = _expected(service, asked, prompt)
        max_tokens = _max_tokens(service, asked, prompt)
        beside = -1 if asked.prompt_logprobs is None else asked.prompt_logprobs
        extent = Extent(asked.min_tokens, asked.echoed, max_tokens > 0, asked.wanted_logprobs, beside)
        for number in range(asked.n):
            index = len(job.sequences)
            sequence = Sequence(
                id=f"{response_id}-{index}",
                prompt=prompt,
                sampling=replace(sampling, seed=seed_for(seed, index)),
                max_tokens=max(max_tokens, 1),  # a token that is not wanted comes with the scores of a prompt
                prompt_logprobs=asked.wanted_prompt_logprobs,
                stop_token_ids=asked.stop_token_ids,
                ignore_eos=asked.ignore_eos,
                trace=visit.trace,
                key=visit.account.name if visit.account is not None else "",
            )
            job.sequences.append(sequence)
            stops = StopMatcher(asked.stop, keep=asked.include_stop_str_in_output)
            reader = Reader(expects, partial(call_id, sequence.id)) if expects else None
            choice = Choice(service.tokenizer, prompt, stops, extent, first=number == 0, reader=reader)
            job.choices.append(choice)
    return job


def _expected(service: Service, asked: CommonRequest, prompt: list[int]) -> Expected | None:
    """What to look for in the answer; None: it is plain text."""
    if not isinstance(asked, ChatRequest):
        return None
    form = service.tool_calls if asked.calls_tools else None
    reasoning = service.reasoning if asked.separate_reasoning else ReasoningParser.NONE
    if asked.forced_tools:  # the grammar has nothing but calls
        form, reasoning = CHOSEN, ReasoningParser.NONE
    if form is None and reasoning is ReasoningParser.NONE:
        return None
    return Expected(
        form=form,
        tools=frozenset(tool.function.name for tool in asked.tools),
        parallel=asked.parallel_tool_calls,
        reasoning=reasoning is not ReasoningParser.NONE,
        reasons_first=reasons_first(reasoning, service.tokenizer.decode_all(prompt[-PROMPT_END:])),
        show_reasoning=asked.include_reasoning,
    )


def _max_tokens(service: Service, asked: CommonRequest, prompt: list[int]) -> int:
    """How many tokens to generate; RequestError if prompt and answer do not fit into the context."""
    chat = isinstance(asked, ChatRequest)
    field = "messages" if chat else "prompt"
    room = service.context - len(prompt)
    if not prompt:
        raise RequestError(f"{field} must not be empty", param=field)
    if room < 1:
        raise _too_long(f"it has {len(prompt)} tokens", service, field)
    limit = asked.token_limit if isinstance(asked, ChatRequest) else asked.max_tokens
    if limit is None:
        return room if chat else min(room, COMPLETION_TOKENS)
    if limit > room:
        raise _too_long(f"it has {len(prompt)} tokens, and max_tokens is {limit}", service, "max_tokens")
    if limit < asked.min_tokens:
        raise RequestError(f"min_tokens={asked.min_tokens} is more than max_tokens={limit}", param="min_tokens")
    return limit


def _too_long(what: str, service: Service, field: str) -> RequestError:
    """In words by which clients (litellm, LangChain) know that a shorter prompt may be tried."""
    message = f"the prompt is too long: {what}, and this model's maximum context length is {service.context} tokens"
    return RequestError(message, param=field, code="context_length_exceeded")


async def _answer(request: Request, service: Service, asked: CommonRequest, job: Job) -> Response:
    job.visit.begin(job.renderer.id, job.prompt_tokens)
    if not asked.stream:
        return json_response(await unless_gone(request, _whole(service, job)))
    shortcut = Shortcut()
    events = _events(service, job, shortcut)
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_never_bare(first, events, job.renderer), {}, shortcut=shortcut)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _whole(service: Service, job: Job) -> Json:
    with _run(service, job) as run:
        async for index, delta in run.generation.deltas():
            run.piece(index, delta)
    return job.renderer.whole(job.prompt_tokens, job.choices)


async def _events(service: Service, job: Job, shortcut: Shortcut) -> AsyncGenerator[bytes, None]:
    """The stream's events up to its end, but for those that go the shorter way."""
    with _run(service, job) as run:

        def taken(index: int, delta: Delta) -> bool:
            if not shortcut.is_open:
                return False
            shortcut.write(run.event(index, delta))
            return True

        run.generation.taker = taken
        async for index, delta in run.generation.deltas():
            if data := run.event(index, delta):
                yield data
    yield job.renderer.ended(job.prompt_tokens, job.choices)


async def _never_bare(
    first: bytes, events: AsyncGenerator[bytes, None], renderer: Answering
) -> AsyncGenerator[bytes, None]:
    """The events; if they break off, the reason as an event."""
    try:
        yield first
        async for data in events:
            yield data
    except RequestError as error:
        yield renderer.failed(error)
    except Exception:
        log.exception("stream_failed", request=renderer.id)
        yield renderer.failed(internal_error())
    finally:
        await events.aclose()


class Run:
    """A job under way: what arrives is counted, timed and made text of."""

    def __init__(self, job: Job, generation: Generation, timers: list[StreamTimer]) -> None:
        self.generation = generation
        self._job, self._timers = job, timers

    def piece(self, index: int, delta: Delta) -> Piece:
        """What a delta adds to its choice."""
        self._timers[index].tokens(len(delta.tokens), delta.queued_s)
        piece = self._job.choices[index].push(delta)
        self._job.visit.generated(len(delta.tokens), piece.finish_reason, delta.queued_s)
        if piece.stopped:
            self.generation.stop(index)
        if piece.finish_reason:
            self._timers[index].end(piece.finish_reason)
        return piece

    def event(self, index: int, delta: Delta) -> bytes:
        """The same as an event, if there is something to say."""
        return self._job.renderer.said(index, self.piece(index, delta), self._job.prompt_tokens, self._job.choices)


@contextmanager
def _run(service: Service, job: Job) -> Iterator[Run]:
    """Run the job; what does not come to its end is aborted at the engine. What is refused has not begun: no end."""
    with service.link.generation(job.sequences) as generation:
        timers = [service.metrics.timer() for _ in job.choices]
        service.metrics.prompt_tokens.inc(job.prompt_tokens)
        try:
            yield Run(job, generation, timers)
        except Exception as error:
            for timer in timers:
                timer.end("refused" if isinstance(error, EngineRefusal) else "error")
            raise
        finally:  # the client went away
            for timer in timers:
                timer.end("abort")
