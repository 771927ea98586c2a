"""Real streaming requests over HTTP, recorded token by token; each stream starts its next request when one ends."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import httpx
import msgspec

from chaos.workload.background import Background
from chaos.workload.history import RequestRecord
from elastic.serve.api_keys import client_headers

PROMPTS = (
    "The for statement", "A function definition", "Lists are mutable", "The import statement", "Exceptions are",
    "A class definition", "The with statement is", "Strings are", "A generator", "The try statement",
    "Dictionaries map", "The yield expression", "Operators such as", "The global statement", "Modules are",
    "Comparison operators", "A context manager", "The return statement", "Integer literals", "The while statement",
)  # fmt: skip

PREAMBLE = (
    "Statements are executed in order. An expression is evaluated from left to right, and the value of a name is the "
    "object that was bound to it last. A block is a piece of text that is executed as a unit. "
)  # some KV blocks long
Positive = Annotated[int, msgspec.Meta(ge=1)]
PAUSE_S = 0.05  # before the next request of a stream whose last one failed: the gateway may be starting


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is asked of a cluster: streams at a time, tokens per answer, and how many of PROMPTS are used."""

    streams: Positive = 8
    max_tokens: Positive = 64
    prompts: Positive = 8
    lengths: tuple[Positive, ...] = ()  # of answers, in turn, instead of `max_tokens`
    rest_s: float = 0.0  # of a stream between two requests
    preamble: str = ""  # what every prompt begins with, so that requests have KV blocks in common
    structured: bool = False  # every answer has to be JSON of a schema


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """What a structured answer is. So narrow that any model comes to its end, and not in a few tokens."""

    n: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
    words: Annotated[list[Literal["for", "while", "with"]], msgspec.Meta(min_length=4, max_length=6)]


FORM = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": msgspec.json.schema(Answer)},
}
FULL = Load(max_tokens=96, prompts=len(PROMPTS))  # every prompt, and answers that are long enough for a fault


class Workload:
    """Streams requests until stopped (or once through), and keeps what it saw.

    Greedy for even requests, seeded sampling with penalties for odd ones: both must come out as in a fault-free run.
    A request is known by its number, which stands for a prompt and a length; lengths are used in turn, as prompts are.
    A stream rests between two requests: without, it takes all of the machine.
    """

    def __init__(
        self,
        url: str,
        model: str,
        load: Load = FULL,
        *,
        prompts: Sequence[str] = (),
        seed: int = 0,
        timeout_s: float = 120.0,
    ) -> None:
        """`prompts`: others than PROMPTS."""
        self.url, self.model = url, model
        self.prompts = prompts or [load.preamble + each for each in PROMPTS[: load.prompts]]
        self.concurrency, self.seed, self.rest_s, self.timeout_s = load.streams, seed, load.rest_s, timeout_s
        self.lengths = load.lengths or (load.max_tokens,)
        self.structured = load.structured
        self.distinct = math.lcm(len(self.prompts), len(self.lengths))
        self._lock = threading.Lock()
        self._done: list[RequestRecord] = []
        self._open: dict[int, int] = {}  # stream -> tokens so far
        self._background = Background("workload", self._run)
        self._next = 0
        self._limit: int | None = None

    # -- running ---------------------------------------------------------------------------------------------------

    def run_once(self) -> list[RequestRecord]:
        """Each distinct request exactly once; returns when all have ended."""
        self._limit = self.distinct
        asyncio.run(self._run())
        return self.records()

    def start(self) -> None:
        """Stream in the background until `stop`."""
        self._background.start()

    def stop(self) -> list[RequestRecord]:
        """Start no more requests, wait for those under way, return all records: every request that was begun.

        WaitTimeout names the streams that do not end; whatever ended the workload itself is raised.
        """
        self._background.stop(self.timeout_s + 10.0, lambda: f"tokens per open stream: {self.open_streams()}")
        return self.records()

    def records(self) -> list[RequestRecord]:
        """What has ended so far."""
        with self._lock:
            return list(self._done)

    def open_streams(self) -> dict[int, int]:
        """Streams under way: stream -> tokens received of the current request."""
        with self._lock:
            return dict(self._open)

    # -- one stream --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(
            base_url=self.url, headers=client_headers(), timeout=self.timeout_s, limits=limits, trust_env=False
        ) as client:
            await asyncio.gather(*(self._stream(client, number) for number in range(self.concurrency)))

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        while not self._background.stopping.is_set() and (self._limit is None or self._next < self._limit):
            prompt, self._next = self._next % self.distinct, self._next + 1
            record = await self._request(client, number, prompt)
            with self._lock:
                self._done.append(record)
                self._open.pop(number, None)
            if self._limit is None:
                await asyncio.sleep(max(self.rest_s, PAUSE_S if record.error else 0.0))

    def body(self, prompt: int) -> dict[str, object]:
        """The request of this number, the same in every run."""
        sampled = {"temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "min_p": 0.01}
        return {
            "model": self.model, "prompt": self.prompts[prompt % len(self.prompts)],
            "max_tokens": self.lengths[prompt % len(self.lengths)], "stream": True, "logprobs": 0,
            "seed": self.seed + prompt, **(sampled if prompt % 2 == 1 else {"temperature": 0.0}),
            **({"response_format": FORM} if self.structured else {}),
        }  # fmt: skip

    async def _request(self, client: httpx.AsyncClient, number: int, prompt: int) -> RequestRecord:
        seen = Seen()
        started = time.monotonic()
        try:
            async with client.stream("POST", "/v1/completions", json=self.body(prompt)) as answer:
                seen.status = answer.status_code
                if answer.status_code != 200:
                    await answer.aread()
                    seen.error = f"HTTP {answer.status_code}: {answer.text[:200]}"
                else:
                    async for line in answer.aiter_lines():
                        seen.read(line, time.monotonic())
                        with self._lock:
                            self._open[number] = len(seen.tokens)
        except (httpx.HTTPError, ValueError) as problem:  # ValueError: an event that is no JSON
            seen.error = f"{type(problem).__name__}: {problem}"
        if self.structured and seen.done and not seen.error:
            seen.error = what_is_wrong("".join(seen.tokens))
        return RequestRecord(
            prompt=prompt, started=started, ended=time.monotonic(), id=seen.id, error=seen.error, status=seen.status,
            token_times=tuple(seen.times), tokens=tuple(seen.tokens),
            finish_reason=seen.finish_reason if seen.done else "",
        )  # fmt: skip


def what_is_wrong(text: str) -> str:
    """Why this is no structured answer; "" if it is one."""
    try:
        msgspec.json.decode(text, type=Answer)
    except msgspec.MsgspecError as error:
        return f"it is not what its schema says: {error}: {text[:200]!r}"
    return ""


@dataclass
class Seen:
    """What one stream has brought so far."""

    times: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    id: str = ""
    finish_reason: str = ""
    error: str = ""
    status: int = 0
    done: bool = False  # a stream without [DONE] broke off, whatever it said before

    def read(self, line: str, now: float) -> None:
        """Take in one line of the event stream."""
        self.done = self.done or line == "data: [DONE]"
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = str(event["error"].get("message"))
            return
        self.id = str(event.get("id", ""))
        for choice in event.get("choices", ()):
            new = (choice.get("logprobs") or {}).get("tokens") or []
            self.tokens += new
            self.times += [now] * len(new)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
