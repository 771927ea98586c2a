"""A campaign: many episodes in several processes until there were enough faults, and a sample of them run again.

An episode that comes out differently the second time would make every other result worthless, so that is a violation
too. The first episodes walk along all ordered pairs of faults. Schedules that break an invariant are minimised.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count, islice, product
from typing import NamedTuple

import msgspec

from chaos.simulation.episode import PAIRED_EVERY, WALKED, Episode, every_fault, run_episode
from chaos.simulation.minimise import Minimal, command, minimise
from chaos.simulation.pairs import Pair, pairs_of, parts
from membership.base.starter import end_with_starter

BATCH = 10  # episodes per task of a process
BATCH_LIMIT_S = 600.0
PROGRESS_EVERY = 5
ROUNDS = 3  # of the walk along all pairs, before anything else
MINIMISED = 3  # violations that are minimised
MINIMISE_S = 60.0  # for all of them together
SHOWN = 10  # violations in the receipt

OnProgress = Callable[["Progress"], None]


class Progress(msgspec.Struct, frozen=True):
    """How far the campaign is."""

    episodes: int
    faults: int
    seconds: float
    pairs: int
    violations: int
    doing: str = "running"


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A seed that broke an invariant. `again` is the command that reproduces it."""

    seed: int
    violation: str
    again: str
    minimal: Minimal | None = None


class SimulationReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the episodes have shown. Each violation can be replayed alone."""

    ok: bool
    seed: int
    hosts: int  # 0: all on one
    gpus: bool = False
    episodes: int = msgspec.field(name="lives")
    faults: int
    faults_per_minute: int
    kinds: dict[str, int]  # number of episodes in which a kind of event occurred
    points: dict[str, int]  # how often a failpoint was triggered
    pairs: str  # ordered pairs of faults that met: seen/total
    pairs_missing: tuple[str, ...] = ()
    epochs: int
    requests: int
    tokens: int
    refused: int
    replayed: int  # episodes run again in another process; if ok, with the same result
    seconds: float
    virtual_seconds: float
    violations: tuple[Broken, ...] = ()


class Where(NamedTuple):
    """What episodes run on."""

    hosts: int = 0  # 0: all is on one
    gpus: bool = False

    def run(self, seed: int) -> Episode:
        """The episode of this seed."""
        return run_episode(seed, hosts=self.hosts, gpus=self.gpus)


ANYWHERE = Where()


@dataclass
class _Campaign:
    """The results so far."""

    seed: int
    where: Where
    on_progress: OnProgress
    began: float = field(default_factory=time.monotonic)
    digests: dict[int, str] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    pairs: set[Pair] = field(default_factory=set)
    broken: list[tuple[Episode, str]] = field(default_factory=list)
    virtual_s: float = 0.0
    seconds: float = 0.0
    replayed: int = 0

    def add(self, episode: Episode) -> None:
        self.digests[episode.seed] = episode.digest
        for name in ("faults", "epochs", "requests", "tokens", "refused"):
            self.totals[name] += getattr(episode, name)
        self.kinds.update(episode.kinds)
        self.points.update(episode.points)
        self.pairs |= pairs_of(episode.steps, every_fault(self.where.hosts, gpus=self.where.gpus))
        self.virtual_s += episode.seconds
        if episode.violation:
            self.broken.append((episode, episode.violation))

    def progress(self, doing: str = "running") -> None:
        seconds, faults = time.monotonic() - self.began, self.totals["faults"]
        self.on_progress(Progress(len(self.digests), faults, seconds, len(self.pairs), len(self.broken), doing))

    def replay(self, episode: Episode) -> None:
        self.replayed += 1
        if episode.digest != self.digests[episode.seed]:
            self.broken.append((episode, "another outcome when it was run again"))

    def receipt(self, violations: Sequence[Broken]) -> SimulationReceipt:
        every = list(product(sorted(every_fault(self.where.hosts, gpus=self.where.gpus)), repeat=2))
        missing = [f"{first} then {second}" for first, second in every if (first, second) not in self.pairs]
        return SimulationReceipt(
            ok=not violations,
            seed=self.seed,
            hosts=self.where.hosts,
            gpus=self.where.gpus,
            episodes=len(self.digests),
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
    on_progress: OnProgress = lambda progress: None,
    *,
    replays: int = 0,
    minimised: int = MINIMISED,
    where: Where = ANYWHERE,
) -> SimulationReceipt:
    """Run episodes from `seed` on in `jobs` processes until there were `faults`, then `replays` of them again."""
    campaign = _Campaign(seed, where, on_progress)
    episodes = _episodes(seeds_from(seed, where), jobs, where)
    for episode in episodes:
        campaign.add(episode)
        if len(campaign.digests) % PROGRESS_EVERY == 0:
            campaign.progress()
        if campaign.totals["faults"] >= faults:
            break
    episodes.close()
    campaign.progress()
    campaign.seconds = time.monotonic() - campaign.began
    for episode in _replayed(list(campaign.digests), replays, jobs, where):
        campaign.replay(episode)
        if campaign.replayed % BATCH == 0:
            campaign.progress(f"running again {campaign.replayed}/{replays}")
    return campaign.receipt(list(_minimised(campaign, minimised)))


def seeds_from(seed: int, where: Where = ANYWHERE) -> Iterator[int]:
    """All seeds in order: first those that walk along the pairs of faults, then the others."""
    first = -(-seed // PAIRED_EVERY) * PAIRED_EVERY
    pieces = ROUNDS * parts(sorted(every_fault(where.hosts, gpus=where.gpus)), WALKED)
    walks = list(range(first, first + PAIRED_EVERY * pieces, PAIRED_EVERY))
    known = set(walks)
    return chain(walks, (other for other in count(seed) if other not in known))


def _minimised(campaign: _Campaign, most: int) -> Iterator[Broken]:
    for number, (episode, violation) in enumerate(campaign.broken[:SHOWN]):
        minimal = None
        if number < most and episode.violation == violation:
            campaign.progress(f"minimising seed {episode.seed}")
            minimal = minimise(episode, MINIMISE_S / most)
        again = minimal.again if minimal else command(episode.seed, None, hosts=episode.hosts, gpus=episode.gpus)
        yield Broken(seed=episode.seed, violation=violation, again=again, minimal=minimal)


def _episodes(seeds: Iterator[int], jobs: int, where: Where) -> Generator[Episode, None, None]:
    """Episodes in the order of `seeds`, without end."""
    if jobs == 1:
        yield from (where.run(seed) for seed in seeds)
        return
    batches = (list(islice(seeds, BATCH)) for _ in count())
    for batch in _in_processes(batches, jobs, where):
        yield from batch


def _replayed(known: Sequence[int], replays: int, jobs: int, where: Where) -> Iterator[Episode]:
    """A sample of the known seeds, run by fresh processes."""
    some = known[:: max(1, len(known) // replays)][:replays] if replays else []
    batches = [list(some[at : at + BATCH]) for at in range(0, len(some), BATCH)]
    return (episode for batch in _in_processes(iter(batches), jobs, where) for episode in batch)


def _in_processes(batches: Iterator[list[int]], jobs: int, where: Where) -> Generator[list[Episode], None, None]:
    first = list(islice(batches, 2 * jobs))
    if not first:
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_starter) as pool:
        running = deque(pool.submit(_batch, batch, where) for batch in first)
        try:
            while running:
                yield running.popleft().result(timeout=BATCH_LIMIT_S)
                running.extend(pool.submit(_batch, batch, where) for batch in islice(batches, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _batch(seeds: Iterable[int], where: Where) -> list[Episode]:
    """Run some episodes here. Their garbage is small, and collecting it would take a tenth of the time."""
    gc.disable()
    try:
        return [where.run(seed) for seed in seeds]
    finally:
        gc.enable()
        gc.collect()
