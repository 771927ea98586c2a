"""Calls from an executor to its ranks: what travels, and what the caller still waits for.

Every call has an id and every reply names it. Without ids, one late reply would be taken as the answer to the next
call, and so on. A call ends as soon as its outcome is certain: with all replies, at the first error of any rank (also
one that was not to reply), or at the death of a rank that was asked.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import Any

import msgspec

from membership.base.errors import (
    DeviceFull,
    ElasticError,
    QueueError,
    RankDied,
    RankError,
    RankFailed,
    RankFull,
    WaitTimeout,
)
from membership.base.rank_id import ProcessId, RankId

Outcome = dict[ProcessId, Any]


class ResponseStatus(Enum):
    """How a call went on one rank."""

    SUCCESS = auto()
    FAILURE = auto()


@dataclass(frozen=True)
class Call:
    """To the ranks: run `method` (a name, or a cloudpickled callable that takes the worker)."""

    id: int
    ranks: frozenset[ProcessId]
    method: str | bytes
    arguments: bytes  # cloudpickled (args, kwargs): ranks that are not asked leave them unopened
    output_rank: int | None = None  # only this rank replies; any rank reports its failure
    timeout_s: float = 60.0  # max wait for an output that is still being computed


@dataclass(frozen=True)
class Failure:
    """An exception as plain data: exceptions themselves need not survive pickling."""

    kind: str
    message: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """From a rank."""

    id: int
    key: ProcessId
    status: ResponseStatus
    value: Any  # the result, or a Failure


class WireCall(msgspec.Struct, frozen=True, array_like=True):
    """A call from another host: plain data, methods by name."""

    id: int
    ranks: frozenset[RankId]
    method: str
    args: list[Any]
    kwargs: dict[str, Any]
    output_rank: int | None = None
    timeout_s: float = 60.0


AnyCall = Call | WireCall


class WireReply(msgspec.Struct, frozen=True, array_like=True):
    """The reply to another host."""

    id: int
    key: RankId
    value: Any = None
    failure: Failure | None = None

    def local(self) -> Reply:
        """As a reply of this host's kind."""
        if self.failure is not None:
            return Reply(self.id, self.key, ResponseStatus.FAILURE, self.failure)
        return Reply(self.id, self.key, ResponseStatus.SUCCESS, self.value)


def failure_of(error: BaseException, trace: str) -> Failure:
    """Describe an exception of a rank, with its notes and traceback."""
    return Failure(type(error).__name__, str(error), (*getattr(error, "__notes__", ()), trace))


@dataclass
class PendingCall:
    """One call under way."""

    method: str
    waiting: set[ProcessId]
    expected: set[ProcessId]  # whose results make up the outcome
    timeout_s: float
    deadline: float
    future: Future[Outcome] = field(default_factory=Future)
    results: Outcome = field(default_factory=dict)

    def begin(self, gone: Mapping[ProcessId, str], send: Callable[[], object]) -> PendingCall:
        """Send the call, unless its outcome is certain: of the ranks asked some are `gone` (why), or none replies."""
        for key, why in gone.items():
            self.on_death(key, why)
        if not self.expected:
            self.fail(RankError(f"{self.method}: no rank to reply (asked {sorted(self.waiting)})"))
        if not self.future.done():
            try:
                send()
            except QueueError as error:
                self.fail(error)
            except (pickle.PicklingError, TypeError) as error:
                self.fail(RankError(f"{self.method}: its arguments cannot be sent: {error}"))
        return self

    def on_reply(self, reply: Reply) -> None:
        """Take one rank's answer."""
        if isinstance(reply.value, Failure) and reply.status is ResponseStatus.FAILURE:
            failed = RankFull if reply.value.kind == DeviceFull.__name__ else RankFailed
            error = failed(f"{reply.key}: {self.method}: {reply.value.kind}: {reply.value.message}")
            for note in reply.value.notes:
                error.add_note(note)
            return self.fail(error)
        self.waiting.discard(reply.key)
        if reply.key in self.expected:
            self.results[reply.key] = reply.value
        if self.expected <= self.results.keys():
            with suppress(InvalidStateError):  # another thread has ended it
                self.future.set_result(self.results)

    def on_death(self, key: ProcessId, reason: str) -> None:
        """A rank has died; if it was asked and has not answered, the call cannot be known to have worked."""
        if key in self.waiting:
            self.fail(RankDied(f"{key} died during {self.method}: {reason}"))

    def expire(self, now: float) -> None:
        """End the call if its deadline has passed, and name the ranks that have not answered."""
        if now >= self.deadline:
            missing = ", ".join(str(key) for key in sorted(self.waiting & self.expected)) or "no rank"
            self.fail(WaitTimeout(f"{self.method}: no answer within {self.timeout_s:g} s from {missing}"))

    def fail(self, error: ElasticError) -> None:
        """End the call with an error, if it has not ended."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class CallTable:
    """All calls of one executor that are under way. Thread-safe; completions run in the thread that brought them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = count(1)
        self._pending: dict[int, PendingCall] = {}

    def open(
        self, method: str, targets: Collection[ProcessId], output_rank: int | None, timeout_s: float, now: float
    ) -> tuple[int, PendingCall]:
        """Register a call before it is sent."""
        expected = {key for key in targets if output_rank is None or key.slot == output_rank}
        call = PendingCall(method, set(targets), expected, timeout_s, now + timeout_s)
        with self._lock:
            number = next(self._ids)
            self._pending[number] = call
        call.future.add_done_callback(lambda _: self._forget(number))
        return number, call

    def on_reply(self, reply: Reply) -> bool:
        """Hand a reply to its call; False if that has ended."""
        with self._lock:
            call = self._pending.get(reply.id)
        if call is None:
            return False
        call.on_reply(reply)
        return True

    def on_death(self, key: ProcessId, reason: str) -> None:
        """As PendingCall.on_death, for all calls."""
        for call in self._all():
            call.on_death(key, reason)

    def expire(self, now: float) -> None:
        """End what is past its deadline."""
        for call in self._all():
            call.expire(now)

    def close(self, error: ElasticError) -> None:
        """Fail whatever is left."""
        for call in self._all():
            call.fail(error)

    def __len__(self) -> int:
        with self._lock:
            return len(self._pending)

    def _all(self) -> list[PendingCall]:
        with self._lock:
            return list(self._pending.values())

    def _forget(self, number: int) -> None:
        with self._lock:
            self._pending.pop(number, None)
