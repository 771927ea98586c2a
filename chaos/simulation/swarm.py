"""Many lives, some on each processor, until there were enough faults; and some of them again, in other processes.

A life that comes out otherwise the second time would make every other verdict worthless. The first lives walk along all
ordered pairs of faults. What breaks a promise is shrunk to the few happenings that it takes.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count, islice

import msgspec

from chaos.simulation.faults import FAULTS
from chaos.simulation.life import PAIRED_EVERY, WALKED, Life, live
from chaos.simulation.minimise import Minimal, minimise
from chaos.simulation.pairs import Pair, pairs_of, parts

BATCH = 10  # lives that a process is given at a time
BATCH_LIMIT_S = 600.0
TOLD_EVERY = 5
ROUNDS = 3  # of the walk along all pairs, before anything else
MINIMISED = 3  # violations that are shrunk
MINIMISE_S = 60.0  # for all of them
SHOWN = 10
MISSING_SHOWN = 20

Tell = Callable[["Progress"], None]


class Progress(msgspec.Struct, frozen=True):
    """How far it is."""

    lives: int
    faults: int
    seconds: float
    pairs: int
    violations: int
    doing: str = "living"


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A seed that broke a promise; `again` is the command that shows it."""

    seed: int
    violation: str
    again: str
    minimal: Minimal | None = None


class SimulationReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the lives proved; each violation can be replayed alone."""

    ok: bool
    seed: int
    lives: int
    faults: int
    faults_per_minute: int
    kinds: dict[str, int]  # in how many lives a kind of fault or change happened
    points: dict[str, int]  # how often a failpoint struck
    pairs: str  # ordered pairs of faults that met: seen/total
    pairs_missing: tuple[str, ...] = ()
    epochs: int
    requests: int
    tokens: int
    refused: int
    replayed: int  # lives that were lived again in another process, and came out the same if ok
    seconds: float
    virtual_seconds: float
    violations: tuple[Broken, ...] = ()


@dataclass
class _Swarm:
    """What is known so far."""

    seed: int
    tell: Tell
    began: float = field(default_factory=time.monotonic)
    digests: dict[int, str] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    pairs: set[Pair] = field(default_factory=set)
    broken: list[tuple[Life, str]] = field(default_factory=list)
    virtual_s: float = 0.0
    seconds: float = 0.0
    replayed: int = 0

    def add(self, life: Life) -> None:
        """One more life."""
        self.digests[life.seed] = life.digest
        for name in ("faults", "epochs", "requests", "tokens", "refused"):
            self.totals[name] += getattr(life, name)
        self.kinds.update(life.kinds)
        self.points.update(life.points)
        self.pairs |= pairs_of(life.steps, FAULTS)
        self.virtual_s += life.seconds
        if life.violation:
            self.broken.append((life, life.violation))

    def progress(self, doing: str = "living") -> None:
        """Tell how far it is."""
        seconds, faults = time.monotonic() - self.began, self.totals["faults"]
        self.tell(Progress(len(self.digests), faults, seconds, len(self.pairs), len(self.broken), doing))

    def again(self, life: Life) -> None:
        """A life was lived once more."""
        self.replayed += 1
        if life.digest != self.digests[life.seed]:
            self.broken.append((life, "another outcome when it was lived again"))

    def receipt(self, violations: Sequence[Broken]) -> SimulationReceipt:
        """What it all comes to."""
        every = [(first, second) for first in sorted(FAULTS) for second in sorted(FAULTS)]
        missing = [f"{first} then {second}" for first, second in every if (first, second) not in self.pairs]
        return SimulationReceipt(
            ok=not violations,
            seed=self.seed,
            lives=len(self.digests),
            faults_per_minute=round(60 * self.totals["faults"] / max(self.seconds, 1e-9)),
            kinds=dict(sorted(self.kinds.items())),
            points=dict(sorted(self.points.items())),
            pairs=f"{len(every) - len(missing)}/{len(every)}",
            pairs_missing=tuple(missing),
            replayed=self.replayed,
            seconds=round(self.seconds, 1),
            virtual_seconds=round(self.virtual_s),
            violations=tuple(violations),
            **{name: self.totals[name] for name in ("faults", "epochs", "requests", "tokens", "refused")},
        )


def simulate(
    seed: int,
    faults: int,
    jobs: int,
    tell: Tell = lambda progress: None,
    *,
    replays: int = 0,
    minimised: int = MINIMISED,
) -> SimulationReceipt:
    """Lives from `seed` on, in `jobs` processes, until there were `faults`; `replays` of them again in others."""
    swarm = _Swarm(seed, tell)
    lives = _lives(seeds_from(seed), jobs)
    for life in lives:
        swarm.add(life)
        if len(swarm.digests) % TOLD_EVERY == 0:
            swarm.progress()
        if swarm.totals["faults"] >= faults:
            break
    lives.close()
    swarm.progress()
    swarm.seconds = time.monotonic() - swarm.began
    for life in _replayed(list(swarm.digests), replays, jobs):
        swarm.again(life)
        if swarm.replayed % BATCH == 0:
            swarm.progress(f"living again {swarm.replayed}/{replays}")
    return swarm.receipt(list(_shrunk(swarm, minimised)))


def seeds_from(seed: int) -> Iterator[int]:
    """The seeds in the order in which they are lived: first those that walk along the pairs, then all others."""
    first = -(-seed // PAIRED_EVERY) * PAIRED_EVERY
    walks = list(range(first, first + PAIRED_EVERY * ROUNDS * parts(sorted(FAULTS), WALKED), PAIRED_EVERY))
    known = set(walks)
    return chain(walks, (other for other in count(seed) if other not in known))


def _shrunk(swarm: _Swarm, most: int) -> Iterator[Broken]:
    for number, (life, violation) in enumerate(swarm.broken[:SHOWN]):
        minimal = None
        if number < most and life.violation == violation:
            swarm.progress(f"shrinking the life of seed {life.seed}")
            minimal = minimise(life, MINIMISE_S / most)
        again = minimal.again if minimal else f"elastic-chaos replay --seed {life.seed}"
        yield Broken(seed=life.seed, violation=violation, again=again, minimal=minimal)


def _lives(seeds: Iterator[int], jobs: int) -> Generator[Life, None, None]:
    """Life after life, for ever, in the order of `seeds`."""
    if jobs == 1:
        yield from map(live, seeds)
        return
    batches = (list(islice(seeds, BATCH)) for _ in count())
    for batch in _in_processes(batches, jobs):
        yield from batch


def _replayed(known: Sequence[int], replays: int, jobs: int) -> Iterator[Life]:
    """A sample of the known, lived by processes that have lived nothing yet."""
    some = known[:: max(1, len(known) // replays)][:replays] if replays else []
    batches = [list(some[at : at + BATCH]) for at in range(0, len(some), BATCH)]
    return (life for batch in _in_processes(iter(batches), jobs) for life in batch)


def _in_processes(batches: Iterator[list[int]], jobs: int) -> Generator[list[Life], None, None]:
    first = list(islice(batches, 2 * jobs))
    if not first:
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = deque(pool.submit(_batch, batch) for batch in first)
        try:
            while running:
                yield running.popleft().result(timeout=BATCH_LIMIT_S)
                running.extend(pool.submit(_batch, batch) for batch in islice(batches, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _batch(seeds: Iterable[int]) -> list[Life]:
    """Some lives, in this process. A life's garbage is little, and looking for it takes a tenth of the time."""
    gc.disable()
    try:
        return [live(seed) for seed in seeds]
    finally:
        gc.enable()
        gc.collect()
