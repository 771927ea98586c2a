"""Calls under way: which replies, failures and deaths end which call."""

from __future__ import annotations

import pytest

from membership.base.errors import DeviceFull, RankDied, RankFailed, RankFull, WaitTimeout
from membership.base.rank_id import RankId
from workers.protocol.rpc import CallTable, PendingCall, Reply, ResponseStatus, failure_of

pytestmark = pytest.mark.unit

A, B = RankId(0, 1), RankId(1, 2)


def ok(number: int, key: RankId, value: object) -> Reply:
    return Reply(number, key, ResponseStatus.SUCCESS, value)


def bad(number: int, key: RankId) -> Reply:
    return Reply(number, key, ResponseStatus.FAILURE, failure_of(ValueError("no"), "the traceback"))


def opened(table: CallTable, output_rank: int | None = None) -> tuple[int, PendingCall]:
    return table.open("work", {A, B}, output_rank, 5.0, 100.0)


def test_a_call_ends_with_all_replies() -> None:
    table = CallTable()
    number, call = opened(table)
    assert table.on_reply(ok(number, B, "b"))
    assert not call.future.done()
    assert table.on_reply(ok(number, A, "a"))
    assert call.future.result(timeout=0) == {A: "a", B: "b"}
    assert len(table) == 0


def test_a_reply_to_a_call_that_has_ended_is_dropped() -> None:
    table = CallTable()
    first, call = opened(table)
    table.expire(105.0)
    with pytest.raises(WaitTimeout, match=r"work: no answer within 5 s from rank 0 .*, rank 1"):
        call.future.result(timeout=0)
    second, next_call = opened(table)
    assert not table.on_reply(ok(first, A, "late"))
    table.on_reply(ok(second, A, "a"))
    table.on_reply(ok(second, B, "b"))
    assert next_call.future.result(timeout=0) == {A: "a", B: "b"}


def test_a_failure_of_any_rank_ends_the_call_at_once() -> None:
    table = CallTable()
    number, call = opened(table, output_rank=0)
    table.on_reply(bad(number, B))
    with pytest.raises(RankFailed, match=r"rank 1 \(incarnation 2\): work: ValueError: no") as caught:
        call.future.result(timeout=0)
    assert caught.value.__notes__ == ["the traceback"]


def test_who_called_is_told_that_device_memory_lacks() -> None:
    table = CallTable()
    number, call = opened(table)
    failure = failure_of(DeviceFull("out of device memory: 2 GiB"), "the traceback")
    table.on_reply(Reply(number, B, ResponseStatus.FAILURE, failure))
    with pytest.raises(RankFull, match="DeviceFull: out of device memory: 2 GiB"):
        call.future.result(timeout=0)


def test_a_death_ends_only_calls_that_wait_for_that_rank() -> None:
    table = CallTable()
    _, both = opened(table)
    _, only_a = table.open("other", {A}, None, 5.0, 100.0)
    answered, half = opened(table)
    table.on_reply(ok(answered, B, "b"))
    table.on_death(B, "killed")
    with pytest.raises(RankDied, match="rank 1"):
        both.future.result(timeout=0)
    assert not only_a.future.done()
    assert not half.future.done(), "what it answered before it died stays valid"
    table.on_reply(ok(answered, A, "a"))
    assert half.future.result(timeout=0) == {A: "a", B: "b"}


def test_only_the_output_rank_is_waited_for() -> None:
    table = CallTable()
    number, call = opened(table, output_rank=1)
    table.on_reply(ok(number, B, "b"))
    assert call.future.result(timeout=0) == {B: "b"}
