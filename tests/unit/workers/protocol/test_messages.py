"""Steps between versions: an upgrade replaces roles one at a time, so an engine may drive ranks of another version."""

from __future__ import annotations

import gc

import msgspec
import pytest

from elastic.protocol import EndToken, Tokens
from workers.protocol.messages import (
    EngineMessage,
    History,
    RankMessage,
    SampledToken,
    Sampling,
    Score,
    SeqChunk,
    StepBatch,
    StepResult,
    StepStatus,
    TokenLogprobs,
    TracedResult,
    TracedStep,
)

pytestmark = pytest.mark.unit

CHUNK = SeqChunk(1, 0, [5], [0])


class Before(msgspec.Struct, frozen=True, array_like=True, tag="StepBatch"):
    """A step as it was before ranks could run one together."""

    engine_token: int
    epoch: int
    step: int
    attempt: int
    masked: list[int]
    ranks: dict[int, list[SeqChunk]]
    known: dict[int, dict[int, bytes]] = {}


class TracedBefore(Before, frozen=True, array_like=True, tag="TracedStep"):
    traced: list[int] = []


def test_ranks_of_the_version_before_read_our_steps() -> None:
    step = StepBatch(7, 1, 2, 0, [3], {0: [CHUNK]}, {0: {1: b"x"}})
    decoder = msgspec.msgpack.Decoder(Before | TracedBefore)
    known = (7, 1, 2, 0, [3], {0: [CHUNK]}, {0: {1: b"x"}})
    assert decoder.decode(msgspec.msgpack.encode(step)) == Before(*known)
    assert decoder.decode(msgspec.msgpack.encode(TracedStep.of(step, [1]))) == TracedBefore(*known, [1])


def test_we_read_the_steps_of_an_engine_of_the_version_before() -> None:
    decoder = msgspec.msgpack.Decoder(EngineMessage)
    given = (7, 1, 2, 0, [3], {0: [CHUNK]})
    assert decoder.decode(msgspec.msgpack.encode(Before(*given))) == StepBatch(*given)
    found = decoder.decode(msgspec.msgpack.encode(TracedBefore(*given, {}, [1])))
    assert found == TracedStep(*given, traced=[1])
    assert (found.traced, found.together) == ([1], 0)


def test_a_traced_step_is_run_together_like_any_other() -> None:
    step = TracedStep.of(StepBatch(7, 1, 2, 0, [], {0: [CHUNK], 1: []}, together=9), [1])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=EngineMessage) == step
    assert (step.together, step.traced) == (9, [1])


def test_a_decode_step_leaves_nothing_of_it_to_the_garbage_collector() -> None:
    """A step is made, sent and answered while a GPU waits; collections among its many messages took most of `take`."""
    chunk = SeqChunk(1, 9, [5], [0], Sampling(logprobs=0), History(b""), Score([1], 0))
    answer = SampledToken(1, 5, TokenLogprobs(-0.5))
    made = [chunk, chunk.sample, chunk.history, chunk.score, answer, answer.logprobs]
    tokens = Tokens(7, "request", 0, [5], [TokenLogprobs(-0.5)], end=EndToken(2))
    assert not any(map(gc.is_tracked, [*made, tokens, tokens.end]))
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(StepBatch(7, 1, 2, 0, [], {0: [chunk]})), type=EngineMessage)
    assert not any(map(gc.is_tracked, [read, *read.ranks[0]]))


class AnsweredBefore(msgspec.Struct, frozen=True, array_like=True, tag="StepResult"):
    """An answer as it was before ranks said whether one alone makes use of all cores of its host."""

    rank: int
    incarnation: int
    engine_token: int
    epoch: int
    step: int
    attempt: int
    status: str
    tokens: list[SampledToken] = []
    error: str = ""
    suspects: list[int] = []
    retried_rows: int = 0
    load: bytes = b""
    retried_at: float = 0.0
    unlinked: list[int] = []


class TracedAnswerBefore(AnsweredBefore, frozen=True, array_like=True, tag="TracedResult"):
    took_s: float = 0.0
    exchange_s: float = 0.0


def test_an_engine_of_the_version_before_reads_our_answers() -> None:
    answer = StepResult(1, 4, 7, 1, 2, 0, StepStatus.OK, [SampledToken(1, 9)], fills_host=True)
    decoder = msgspec.msgpack.Decoder(AnsweredBefore | TracedAnswerBefore)
    known = (1, 4, 7, 1, 2, 0, "ok", [SampledToken(1, 9)])
    assert decoder.decode(msgspec.msgpack.encode(answer)) == AnsweredBefore(*known)
    traced = decoder.decode(msgspec.msgpack.encode(TracedResult.of(answer, 0.5, 0.25)))
    assert traced == TracedAnswerBefore(*known, took_s=0.5, exchange_s=0.25)


def test_we_read_the_answers_of_ranks_of_the_version_before() -> None:
    decoder = msgspec.msgpack.Decoder(RankMessage)
    given = (1, 4, 7, 1, 2, 0, "ok", [SampledToken(1, 9)])
    answer = StepResult(1, 4, 7, 1, 2, 0, StepStatus.OK, [SampledToken(1, 9)])
    assert decoder.decode(msgspec.msgpack.encode(AnsweredBefore(*given))) == answer
    found = decoder.decode(msgspec.msgpack.encode(TracedAnswerBefore(*given, took_s=0.5, exchange_s=0.25)))
    assert found == TracedResult.of(answer, 0.5, 0.25)
    assert not found.fills_host
