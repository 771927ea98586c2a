"""When the cluster is settled enough for a spare to be made: never while a rank is missing, on its way, or suspect."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.base.errors import RankDied, RankFailed, RankFull
from membership.base.rank_id import RankId, SpareId
from membership.store.records import (
    Assignment,
    ClusterConfig,
    Desired,
    EngineStatus,
    Operation,
    Phase,
    RankSpec,
    View,
)
from tests.support.cluster_states import TOKEN, healthy, without
from workers.agent.restart_policy import FULL_SPARE_MAX_S, FULL_SPARE_S, RestartPolicy
from workers.agent.spares import Spares, next_number, settled
from workers.protocol.device_note import NOTHING, DeviceNote
from workers.protocol.identity import Identity

pytestmark = pytest.mark.unit


def test_a_whole_cluster_is_settled() -> None:
    assert settled(healthy())
    assert settled(healthy(engine=None, engine_status=None)), "no engine is there to take up the view"


@pytest.mark.parametrize(
    "changes",
    [
        {"view": None},
        {"next": View(epoch=4)},
        {"operations": {"o": Operation(id="o", kind=OperationKind.SCALE, target=5, phase=Phase.SPAWNING)}},
        {"engine_status": None},
        {"engine_status": EngineStatus(token=TOKEN, epoch=2)},
        {"engine_status": EngineStatus(token=TOKEN - 1, epoch=3)},
        {"desired": Desired(ranks=5, slots=(0, 1, 2, 3, 4))},
        {"assignments": {"n": Assignment(node="n", ranks=(RankSpec(rank=1, incarnation=9),))}},
    ],
)
def test_not_while_something_is_to_be_done(changes: dict[str, Any]) -> None:
    assert not settled(healthy(**changes))


def test_not_between_a_death_and_the_view_with_its_successor() -> None:
    whole = healthy()
    assert whole.view is not None
    dead = without(whole, 2)
    assert not settled(dead), "its loss is not durable yet"
    masked = replace(dead, view=replace(whole.view, members=tuple(m for m in whole.view.members if m.rank != 2)))
    specs = tuple(spec for spec in whole.assignments["n"].ranks if spec.rank != 2)
    left = replace(masked, assignments={"n": Assignment(node="n", ranks=specs, agent_started=1.0)})
    assert not settled(left), "its successor is to be assigned"
    exits = {2: replace(left.exits[2], quarantined=True)}
    assert settled(replace(left, exits=exits)), "no rank comes into a slot that was set aside"


def test_an_operation_that_ended_is_no_hindrance() -> None:
    assert settled(healthy(operations={"o": Operation(id="o", kind=OperationKind.SCALE, target=4, phase=Phase.DONE)}))


class Executor:
    """Starts spares, which load at once, on a host with so many GPUs."""

    def __init__(self, devices: int) -> None:
        self.devices, self.started, self.adopted = devices, list[int](), list[tuple[int, int]]()
        self.workers: dict[Any, Any] = {}
        self.fail: Exception | None = None  # what the next loads end with
        self.note = NOTHING  # of a spare's device

    def start(self, keys: list[SpareId], timeout_s: float, on_started: Callable[..., None]) -> None:
        self.started += [key.number for key in keys]
        for key in keys:
            page = SimpleNamespace(note=self.note)
            self.workers[key] = SimpleNamespace(child=SimpleNamespace(pid=key.number), dead="", liveness=page)
            on_started(key, self.workers[key])

    def submit(self, method: str, *, keys: list[SpareId], timeout_s: float) -> SimpleNamespace:
        future = Future[dict[SpareId, Identity]]()
        if self.fail is not None:
            future.set_exception(self.fail)
        else:
            future.set_result({key: Identity(devices=self.devices) for key in keys})
        return SimpleNamespace(future=future)

    def adopt(self, spare: SpareId, key: RankId, timeout_s: float, on_adopted: Callable[..., None]) -> None:
        self.adopted.append((spare.number, key.rank))

    def retire(self, keys: list[SpareId], on_ended: Callable[..., None], *, kill: bool) -> None:
        """They end at once."""


def with_spares(
    wanted: int, devices: int, emit: Callable[..., object] = lambda *_, **__: None
) -> tuple[Spares, Executor]:
    """As many as are wanted, each made in a look of its own."""
    executor, loads = Executor(devices), SimpleNamespace(begin=lambda *_: None, end=lambda *_: None)

    def post(work: Callable[..., None], *args: Any) -> None:
        work(*args)

    config, policy = cast("ClusterConfig", healthy().config), RestartPolicy()
    spares = Spares(wanted, cast("Any", executor), config, policy, post, lambda _: None, emit)
    spares._loads = cast("Any", loads)
    for _ in range(wanted):
        spares.tend(healthy(), 1.0)
    return spares, executor


def test_a_spare_becomes_only_a_rank_of_its_gpu() -> None:
    spares, executor = with_spares(1, devices=2)
    assert executor.started == [1]
    assert not spares.take(RankId(2, 21), lambda *_: None), "it is on the other GPU"
    assert spares.take(RankId(3, 21), lambda *_: None)
    assert executor.adopted == [(1, 3)]


def test_each_gpu_has_a_spare_before_one_has_two() -> None:
    spares, executor = with_spares(4, devices=2)
    assert sorted(number % 2 for number in executor.started) == [0, 0, 1, 1]
    assert executor.started[0] % 2 != executor.started[1] % 2
    assert spares.take(RankId(0, 21), lambda *_: None)
    spares.tend(healthy(), 2.0)
    assert executor.started[-1] % 2 == 0, "where the one was that is a rank now"


def test_on_a_cpu_any_spare_becomes_any_rank() -> None:
    spares, executor = with_spares(2, devices=1)
    assert [spares.take(RankId(rank, 21), lambda *_: None) for rank in (3, 0)] == [True, True]
    assert executor.started == [1, 2]


@pytest.mark.parametrize(
    ("last", "present", "devices", "expected"),
    [(0, [], 1, 1), (1, [1], 2, 2), (2, [1], 2, 4), (4, [2, 4], 2, 5), (5, [3, 4], 3, 8), (7, [], 8, 8)],
)
def test_numbers_rise_and_go_to_the_gpu_with_the_fewest(
    last: int, present: list[int], devices: int, expected: int
) -> None:
    assert next_number(last, present, devices) == expected


FULL = "spare 1: initialise: DeviceFull: out of device memory: tried to allocate 2 GiB; lower --kv-cache-memory"


class Clock:
    """The time of day, and what has been reported by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.said = 1_000_000.0, list[tuple[str, str]]()
        monkeypatch.setattr("workers.agent.spares.time.time", lambda: self.now)

    def emit(self, kind: str, **fields: Any) -> None:
        self.said.append((kind, fields.get("reason", "")))

    def attempts_within(self, spares: Spares, executor: Executor, seconds: float) -> list[float]:
        """When spares were made, as seconds from now; looked at once a second."""
        began, made, found = self.now, len(executor.started), []
        while self.now < began + seconds:
            spares.tend(healthy(), self.now)
            if len(executor.started) > made:
                made, found = len(executor.started), [*found, self.now - began]
            self.now += 1.0
        return found


@pytest.mark.parametrize("known_by", ["the error of its load", "its last words", "both, as its death ends the call"])
def test_a_spare_that_lacks_device_memory_is_made_ever_later_and_said_once(
    monkeypatch: pytest.MonkeyPatch, known_by: str
) -> None:
    """Each takes memory beside ranks that serve until it fails."""
    clock = Clock(monkeypatch)
    spares, executor = with_spares(0, devices=1, emit=clock.emit)
    spares._wanted = 1
    if known_by == "the error of its load":
        executor.fail = RankFull(FULL)
    else:  # the process ended before its answer came
        executor.note = DeviceNote(last_words=FULL, full=True)
    if known_by == "both, as its death ends the call":  # which is told before the death itself
        executor.fail = RankDied("spare 1: its process ended (detected by pidfd)")
    elif known_by == "its last words":
        monkeypatch.setattr(spares, "_loaded", lambda key, _: spares.died(key, "detected by pidfd"))
    tried = clock.attempts_within(spares, executor, 4 * FULL_SPARE_MAX_S)
    waits = [b - a for a, b in itertools.pairwise(tried)]
    assert FULL_SPARE_S <= waits[0] <= 1.5 * FULL_SPARE_S + 1.0
    assert all(b > a for a, b in itertools.pairwise(waits[:4])), waits
    assert max(waits) <= 1.5 * FULL_SPARE_MAX_S + 1.0
    assert len(tried) <= 10, "once per 30 s it was"
    [(kind, reason)] = clock.said
    assert kind == "spare_lost"
    assert FULL in reason
    assert "give fewer --spares" in reason


def test_once_a_spare_loads_the_next_lack_of_memory_is_news(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    spares, executor = with_spares(0, devices=1, emit=clock.emit)
    spares._wanted = 1
    executor.fail = RankFull(FULL)
    clock.attempts_within(spares, executor, 300.0)
    executor.fail = None
    clock.attempts_within(spares, executor, 600.0)
    executor.fail = RankFull(FULL)
    assert spares.take(RankId(3, 21), lambda *_: None)
    clock.attempts_within(spares, executor, 300.0)
    assert [kind for kind, _ in clock.said] == ["spare_lost", "spare_ready", "spare_lost"]


def test_a_spare_is_tried_at_once_where_ranks_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    spares, executor = with_spares(0, devices=1, emit=clock.emit)
    spares._wanted = 1
    executor.fail = RankFull(FULL)
    assert clock.attempts_within(spares, executor, FULL_SPARE_S - 1) == [0.0]
    executor.fail, fewer = None, without(healthy(), 2)
    assert fewer.view is not None
    view = replace(fewer.view, members=tuple(m for m in fewer.view.members if m.rank != 2))
    specs = tuple(spec for spec in fewer.assignments["n"].ranks if spec.rank != 2)
    left = replace(
        fewer, view=view, desired=Desired(ranks=3, slots=(0, 1, 3)), exits={},
        assignments={"n": Assignment(node="n", ranks=specs, agent_started=1.0)},
    )  # fmt: skip
    assert settled(left)
    spares.tend(left, clock.now)
    assert len(executor.started) == 2


def test_new_spares_after_a_change_of_the_secret_do_not_wait_for_memory_that_the_old_ones_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    spares, executor = with_spares(1, devices=1, emit=clock.emit)
    spares._wanted = 2
    executor.fail = RankFull(FULL)
    assert clock.attempts_within(spares, executor, FULL_SPARE_S - 1) == [0.0]
    executor.fail = None
    spares.renew()
    spares.tend(healthy(), clock.now)
    assert len(executor.started) == 3


def test_other_failures_are_all_told_and_cost_no_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    spares, executor = with_spares(0, devices=1, emit=clock.emit)
    spares._wanted = 1
    executor.fail = RankFailed("spare 1: initialise: OSError: no such file")
    tried = clock.attempts_within(spares, executor, 120.0)
    assert len(tried) >= 4
    assert len(clock.said) == len(tried)


def test_a_spare_whose_device_is_lost_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no lack of memory: the next one is made as after any death, and reported."""
    clock = Clock(monkeypatch)
    spares, executor = with_spares(0, devices=1, emit=clock.emit)
    spares._wanted = 1
    executor.note = DeviceNote(last_words="cuda:0: CUDA error: uncorrectable ECC error encountered")
    assert clock.attempts_within(spares, executor, 1.0) == [0.0]
    spares.died(SpareId(1), "detected by pidfd")
    assert clock.said[-1] == ("spare_lost", f"{executor.note.last_words}; detected by pidfd")
    assert clock.attempts_within(spares, executor, 1.0) == [0.0]
