"""The one loop of all campaigns: oracle, load, faults, whole again, check, receipt.

A campaign says only what is done under load (`act`) and what its receipt proves. It may be read while it runs (the
demo's picture does). Everything random comes from the seed; the cluster's own timing does not.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from chaos.campaigns.targets import LocalTarget, Target
from chaos.record.recorder import Recorder
from chaos.target.cluster import Cluster
from chaos.workload.history import RequestRecord, Verdict, compare
from chaos.workload.streams import Load, Workload
from membership.base.errors import ConfigError, ElasticError

Notify = Callable[[str], None]
LOAD = Load()
START_S = 300.0  # of a cluster of our own: on a GPU kernels are compiled first. One that cannot start ends earlier
WHOLE_S = 120.0  # from then on
SHOWN = 10  # differences that a receipt shows; all are in the record


class Interrupted(ElasticError):
    """The user wants the run to end."""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a campaign proved. `ok` is False if a promise broke; `broken` says which. Every number was measured."""

    ok: bool
    seed: int
    requests: int
    lost: int
    duplicated: int
    altered: int
    broken: tuple[str, ...] = ()


class LongReceipt(Receipt, frozen=True, kw_only=True):
    """The receipt of a campaign that goes on for long: also how much was served, and how often the view changed."""

    tokens: int
    seconds: float
    epochs: int


def quiet(step: str) -> None:
    """Report progress to no one."""


@dataclass(kw_only=True)
class Campaign(ABC):
    """What all campaigns gather."""

    seed: int = 0
    ranks: int = 0  # at the start and in the end
    load: Load = LOAD
    watched: bool = False  # whether the record also follows the store
    replay: str = ""  # the command that runs it again
    oracle: dict[int, RequestRecord] = field(default_factory=dict)
    history: list[RequestRecord] = field(default_factory=list)
    seconds: float = 0.0  # under load
    troubles: list[str] = field(default_factory=list)  # what could not be done, or was waited for in vain
    workload: Workload | None = None  # the streams under way
    recorder: Recorder | None = None

    @property
    def name(self) -> str:
        """What the record calls it."""
        return type(self).__name__.lower()

    @property
    def cluster(self) -> Cluster:
        """The cluster, of a campaign that needs its processes; ConfigError if it is on another machine."""
        if not isinstance(self.target, LocalTarget):
            raise ConfigError(f"{self.name} needs a cluster on this machine")
        return self.target.cluster

    def run(self, target: Target, notify: Notify = quiet) -> None:
        """All of it. ElasticError if it could not begin; what goes wrong under load is among `troubles`."""
        self.target, self.notify = target, notify
        self.wait_whole(START_S)
        notify("fault-free run of every request (the oracle)")
        model = target.model()
        self.workload = Workload(target.url, model, self.load, seed=self.seed)
        self.oracle = {record.prompt: record for record in self.workload.run_once()}
        self.before()
        with self._recorder() as self.recorder:
            self.recorder.expected(self.oracle.values())
            self.workload = Workload(target.url, model, self.load, seed=self.seed)
            notify("streaming")
            began = time.monotonic()
            self.workload.start()
            try:
                self.act(self.workload)
                self.wait_whole()
            except Interrupted:
                raise
            except ElasticError as error:
                self.fail(error)
            finally:
                self.history = self.workload.stop()
                self.seconds = time.monotonic() - began
                self.recorder.answered(self.history)
        self.after()

    def _recorder(self) -> AbstractContextManager[Recorder]:
        return self.target.recorder(self.name, self.seed, self.replay, watched=self.watched)

    # --- what a campaign may do in its own way

    @abstractmethod
    def act(self, workload: Workload) -> None:
        """Faults and changes under load. An error ends the campaign; it is kept, and the rest is checked."""

    def wait_whole(self, within_s: float = WHOLE_S) -> None:
        """Until every rank serves: before the load, and after the last fault."""
        self.cluster.wait_serving(self.ranks, within_s, notify=self.notify)

    def before(self) -> None:  # noqa: B027 - most need not
        """Look at the cluster before anything is done to it."""

    def after(self) -> None:  # noqa: B027 - most need not
        """Look at it again; say in the record what only the run itself can know."""

    def fail(self, error: ElasticError) -> None:
        """Take note of what ended the campaign early."""
        self.troubles.append(f"{error} ({error.hint})" if error.hint else str(error))
        self.notify(f"stopped: {error}")

    # --- the check

    def verdict(self) -> Verdict:
        """The history beside the oracle."""
        return compare(self.history, self.oracle)

    def unproven(self) -> list[str]:
        """What keeps this run from proving anything, a line each."""
        failed = [record for record in self.oracle.values() if not record.complete]
        broken = [f"the fault-free run of prompt {record.prompt} failed: {record.error}" for record in failed]
        return [*self.troubles, *broken, *([] if self.history else ["no request was compared"])]

    def max_token_gap_ms(self) -> float:
        """The longest that any client waited between two tokens."""
        return round(max((gap for record in self.history for gap in record.gaps_ms()), default=0.0), 1)

    def outcome(self, broken: list[str]) -> dict[str, Any]:
        """The fields of a Receipt."""
        verdict = self.verdict()
        kinds = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "altered")}
        return {"ok": not broken, "seed": self.seed, "requests": verdict.requests, "broken": tuple(broken), **kinds}

    def long_outcome(self, broken: list[str], epochs: int) -> dict[str, Any]:
        """The fields of a LongReceipt."""
        tokens = sum(len(record.tokens) for record in self.history)
        return {**self.outcome(broken), "tokens": tokens, "seconds": round(self.seconds, 1), "epochs": epochs}


def seed_of(given: int | None) -> int:
    """The seed that was asked for, or a fresh one."""
    return random.SystemRandom().randrange(100_000) if given is None else given
