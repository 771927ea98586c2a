"""Steps between versions: an upgrade replaces roles one at a time, so an engine may drive ranks of another version."""

from __future__ import annotations

import msgspec
import pytest

from workers.protocol.messages import EngineMessage, SeqChunk, StepBatch, TracedStep

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
