"""Records of runs that never were, for tests of what reads them: plausible, of any size, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from chaos.faults.base import Injected
from chaos.record.record import Answered, AnyLine, Expected, Happened, Header, InjectedFault, Verified
from chaos.workload.history import RequestRecord
from membership.base.events import Event

STARTED = 1_700_000_000.0
WALL = STARTED - 1000.0  # the monotonic clock showed 1000 s when the run began
PROMPTS = 20
STEP_S = 0.03
WORDS = {
    "kill": "pidfd says process {} is gone", "stop": "/proc says process {} is stopped",
    "segv": "the kernel says process {} ended by SIGSEGV", "step-hang-gil": "process {} has not beaten since",
    "host-cut-off": "nft counted 41 dropped packets", "disk-full": "a write of etcd took 1.2 s",
    "torn-write": "the reader of the queue said so", "clock-jump": "the clock of process {} reads an hour more",
}  # fmt: skip


def header(**changed: Any) -> Header:
    """The first line of a record."""
    facts: dict[str, Any] = {
        "what": "soak", "seed": 7, "started": STARTED, "wall": WALL, "ranks": 4, "model": "demo-moe", "cluster": "demo",
        "replay": "elastic-chaos soak --seed 7",
    }  # fmt: skip
    return Header(**{**facts, **changed})


def happened(at: float, kind: str, role: str = "engine", epoch: int = 0, rank: int | None = None, **fields: Any) -> Any:
    """An event `at` seconds after the run began."""
    return Happened(event=Event(ts=STARTED + at, role=role, kind=kind, epoch=epoch, rank=rank, fields=fields))


def fault_at(
    at: float, fault: str, victim: str, *, pid: int = 0, healed: float = 0.0, proof: str = "seen"
) -> InjectedFault:
    """A fault `at` seconds after the run began, seen 20 ms later."""
    injected = Injected(
        fault=fault, victim=victim, at=STARTED + at, seen_at=STARTED + at + 0.02, proof=proof, pid=pid
    )  # fmt: skip
    return InjectedFault(fault=injected, healed_at=STARTED + healed if healed else 0.0)


def answered(at: float, times: list[float], prompt: int = 0, **changed: Any) -> RequestRecord:
    """A request that began `at` seconds after the run began, and its tokens at those times."""
    facts: dict[str, Any] = {"tokens": tuple(f"t{i}" for i in range(len(times))), "finish_reason": "stop"}
    return RequestRecord(
        prompt=prompt, started=1000.0 + at, token_times=tuple(1000.0 + each for each in times), **{**facts, **changed}
    )


@dataclass
class RecordedCluster:
    """The cluster of a record."""

    chooser: random.Random
    ranks: int
    lines: list[AnyLine] = field(default_factory=list)
    blocked: list[tuple[float, float]] = field(default_factory=list)  # when no stream gets a token
    epoch: int = 1
    incarnation: int = 0
    serving: dict[int, int] = field(default_factory=dict)

    def start(self) -> None:
        """All roles and ranks, before the run."""
        for number, role in enumerate(("controller", "agent", "engine", "engine-standby", "gateway")):
            self.lines.append(happened(-20.0, "role_started", "supervisor", name=role, pid=10 + number))
        self.lines += [
            happened(-18.0, "leader_elected", "controller", node="host", token=3),
            happened(-18.0, "engine_elected", token=4, pid=12),
            happened(-15.0, "gateway_started", "gateway"),
            happened(-10.0, "forkserver_ready", "agent"),
        ]
        for rank in range(self.ranks):
            self._join(-9.0, rank)
        self.commit(-8.0, "all members are ready")

    def fault(self, at: float, name: str) -> None:
        """One fault of a rank and what follows from it."""
        rank = self.chooser.choice(sorted(self.serving))
        pid, healed = self.chooser.randrange(1000, 30_000), 0.0 if name in ("kill", "segv") else at + 0.8
        self.lines.append(fault_at(at, name, f"rank {rank}", pid=pid, healed=healed, proof=WORDS[name].format(pid)))
        if name in ("host-cut-off", "disk-full", "torn-write", "clock-jump"):
            return
        noticed = at + (self.chooser.uniform(0.4, 0.9) if name in ("stop", "step-hang-gil") else 0.001)
        incarnation = self.serving.pop(rank)
        pause = self.chooser.lognormvariate(-1.6, 0.6)
        self.blocked.append((at, noticed + pause))
        fields = {"incarnation": incarnation, "source": "robust futex", "ms": 0.4, "requests": 2}
        self.lines += [
            happened(noticed, "rank_masked", epoch=self.epoch, rank=rank, **fields),
            happened(noticed + 0.01, "rank_died", "agent", rank=rank, incarnation=incarnation, detected_by="pidfd"),
            happened(noticed + pause, "rank_recovered", rank=rank, ms=pause * 1000, requests=2),
        ]
        self.commit(noticed + 0.05, f"epoch {self.epoch + 1} without rank {rank}")
        self._join(noticed + 0.1, rank)
        self.commit(noticed + 0.7, "all members are ready")

    def commit(self, at: float, why: str, **fields: Any) -> None:
        """The next epoch, with the ranks that serve."""
        self.epoch += 1
        ranks = sorted(self.serving)
        self.lines += [
            happened(at, "epoch_committed", "controller", self.epoch, ranks=ranks, reason=why, **fields),
            happened(at + 0.05, "epoch_adopted", "engine", self.epoch, previous=self.epoch - 1, pause_ms=24.0),
        ]  # fmt: skip

    def _join(self, at: float, rank: int) -> None:
        self.incarnation += 1
        self.serving[rank] = self.incarnation
        stages = ("rank_spawned", "rank_ready", "rank_attached", "rank_prepared")
        self.lines += [
            happened(at + delay, kind, "agent", rank=rank, incarnation=self.incarnation)
            for kind, delay in zip(stages, (0.0, 0.1, 0.15, 0.5), strict=True)
        ]

    def requests(self, count: int, streams: int, tokens: int) -> Iterator[RequestRecord]:
        """`count` requests over `streams` connections, which get no token while all are blocked."""
        now, blocked = [0.0] * streams, sorted(self.blocked)
        for number in range(count):
            stream = min(range(streams), key=now.__getitem__)
            began, times = now[stream], list[float]()
            for _ in range(tokens):
                now[stream] += STEP_S * self.chooser.uniform(0.7, 1.5)
                while blocked and blocked[0][1] < min(now):
                    blocked.pop(0)
                stall = next((until for since, until in blocked[:4] if since <= now[stream] < until), 0.0)
                now[stream] = max(now[stream], stall)
                times.append(round(now[stream], 6))
            yield answered(began, times, number % PROMPTS, id=f"cmpl-{number}")


def soak(requests: int = 200, faults: int = 12, *, streams: int = 8, tokens: int = 24, seed: int = 7) -> list[AnyLine]:
    """The record of a soak in which everything went well; about `requests * tokens * 33 ms / streams` long."""
    cluster = RecordedCluster(random.Random(seed), ranks=4)
    cluster.start()
    lasts = requests * tokens * STEP_S * 1.1 / streams
    for number in range(faults):
        name = cluster.chooser.choices(tuple(WORDS), (60, 12, 4, 4, 5, 5, 5, 5))[0]
        cluster.fault((number + 0.5) * lasts / faults, name)
    oracle = [answered(-5.0, [-5.0 + STEP_S * i for i in range(1, tokens + 1)], prompt) for prompt in range(PROMPTS)]
    verified = [Verified(promise=f"G{n}", ok=True, said=f"{100 * n} looks, nothing found") for n in (1, 2, 4, 5, 6, 7)]
    return [
        header(),
        *(Expected(record=record) for record in oracle),
        *(Answered(record=record) for record in cluster.requests(requests, streams, tokens)),
        *cluster.lines,
        *verified,
    ]
