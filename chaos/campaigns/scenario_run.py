"""The campaign of a scenario: its steps under load, each with a deadline; everything is taken back in the end.

The decisions (which victims, what is too much) are pure and in `chaos/scenarios/`. Whatever ends a run (a refusal, a
passed deadline, Ctrl-C), its faults are healed first.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.campaigns.campaign import SHOWN, WHOLE_S, Campaign, Interrupted, LongReceipt, Notify, quiet
from chaos.campaigns.injecting import Faults
from chaos.campaigns.targets import Target
from chaos.campaigns.watch import Streaming, TooFar, Watch
from chaos.faults.base import Injected
from chaos.scenarios.blast_radius import Limits
from chaos.scenarios.script import BACK, Change, Heal, Inject, Release, Scenario, Step, Wait
from chaos.scenarios.victims import Chooser, number_of
from chaos.workload.streams import Workload
from membership.base.errors import ElasticError, OperationConflict
from membership.base.events import Event
from membership.operations.change import Change as Request
from membership.operations.change import drain, scale, undrain
from membership.store.records import Operation, Phase

ENDED_S = 30.0  # after its deadline an operation has ended


class RunReceipt(LongReceipt, frozen=True, kw_only=True):
    """What the run proved."""

    scenario: str
    rounds: int
    faults: dict[str, int]  # each was seen to happen
    operations: dict[str, int]  # how many ended how
    non_2xx: int
    whole_max_ms: float  # the longest way back to full strength, from the last action before it
    max_token_gap_ms: float
    replay: str


@dataclass(kw_only=True)
class ScenarioRun(Campaign):
    """Plays one scenario. `limits`: of a running deployment; `confirm` is asked before each action."""

    scenario: Scenario
    limits: Limits | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    confirm: Callable[[str], bool] = lambda action: True
    rounds: int = 0
    injected: list[Injected] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    _drained: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.load = self.scenario.load

    @property
    def name(self) -> str:
        """What the record calls it."""
        return f"scenario {self.scenario.name}"

    def run(self, target: Target, notify: Notify = quiet) -> None:
        """All of it. What could not be done is among the troubles; only an interruption is raised."""
        self._watch = Watch(target, self.stop, self.limits)
        super().run(target, notify)

    def before(self) -> None:
        """Remember the size; forget the history before the run."""
        self._first_size = self.target.client.status()["desired"]
        self._watch.since(time.time())
        self._watch.history.clear()

    def act(self, workload: Workload) -> None:
        """The steps; then everything is taken back, and a running deployment gets its first size again."""
        if self.recorder is None:
            raise ElasticError("a scenario runs with a recorder")
        chooser = Chooser(random.Random(self.seed))
        self._faults = Faults(self._watch, chooser, self.recorder, self.limits, self.injected, self.troubles)
        try:
            self._steps(workload)
        except Interrupted:
            raise
        except ElasticError as error:
            self.fail(error)
        finally:
            if healed := self._faults.heal():
                self.notify(f"taken back: {healed}")
            self._watch.relax()
        if self.limits is not None:
            self._restore()

    def wait_whole(self, within_s: float = WHOLE_S) -> None:
        """Until every rank serves, none of them one that was killed, and nothing else goes on."""
        self._watch.until(self._watch.is_whole, within_s, "whole")

    def after(self) -> None:
        """Keep the history; note what only the run itself can know."""
        self._watch.since(time.time())
        self.events = self._watch.history
        counts = self.counts()
        wrong = sum(counts[kind] for kind in ("lost", "duplicated", "altered"))
        if self.recorder is not None:
            self.recorder.verified("G3", not wrong, in_words(len(self.history), counts))
            self.recorder.verified("G6", not self.troubles, "; ".join(self.troubles) or "whole in the end")

    # --- steps

    def _steps(self, workload: Workload) -> None:
        self._await(Wait(state="streaming"), workload)
        for turn in range(1, self.scenario.repeat + 1):
            self._faults.chooser.next_round()
            for name, step in self.scenario.numbered(turn):
                self._watch.guard()
                if not isinstance(step, Wait | Heal) and not self.confirm(step.words):
                    raise Interrupted(f"step {name} ({step.words}) was declined; every fault was taken back")
                try:
                    self.notify(f"{name} {self._do(step, workload)}")
                except (Interrupted, TooFar):
                    raise
                except ElasticError as error:
                    raise ElasticError(f"step {name} ({step.words}): {error}", hint=error.hint) from error
            self.rounds = turn

    def _do(self, step: Step, workload: Workload) -> str:
        """Do one step; what came of it, in words."""
        match step:
            case Inject():
                self._faults.remember()
                return self._faults.inject(step)
            case Wait():
                return self._await(step, workload)
            case Change():
                return self._change(step)
            case Release():
                (victim,) = self._faults.choose(step.victim)
                self._watch.act()
                self.target.client.unquarantine(int(victim.split()[1]))
                return f"unquarantine {victim}"
            case Heal():
                self._watch.act()
                return f"taken back: {self._faults.heal(step.fault) or 'nothing'}"

    def _await(self, wait: Wait, workload: Workload) -> str:
        began = time.monotonic()
        if wait.seconds:
            self._watch.pause(wait.seconds)
            return wait.words
        signs: dict[str, Callable[[], bool]] = {
            "whole": self._watch.is_whole,
            "streaming": Streaming(workload),
            "serving": lambda: self._is("serving", "degraded"),
        }
        sign = signs.get(wait.state, lambda: self._is(wait.state)) if wait.state else lambda: self._has_happened(wait)
        self._watch.until(sign, wait.within_s, wait.words)
        if wait.state == "whole":
            self.whole_ms.append(1000 * (time.time() - self._watch.acted_at))
            ended = len(workload.records())
            return f"whole {self.whole_ms[-1]:.0f} ms after the last action; {ended} requests ended"
        return f"{wait.state or wait.event} after {1000 * (time.monotonic() - began):.0f} ms"

    def _is(self, *states: str) -> bool:
        return self.target.client.status()["state"] in states

    def _has_happened(self, wait: Wait) -> bool:
        wanted = dict(wait.fields)
        rank = wanted.pop("rank", None)
        if rank == "same":
            rank = self._faults.chooser.last
        found = (event for event in self._watch.since(self._watch.acted_at) if event.kind == wait.event)
        return any(rank in (None, event.rank) and wanted.items() <= event.fields.items() for event in found)

    # --- changes

    def _change(self, change: Change) -> str:
        desired = self.target.client.status()["desired"]
        last = self._watch.incarnation(self._watch.sight().newest)
        victims = [each for victim in change.victims if victim != BACK for each in self._faults.choose(victim)]
        request = self._request(change, [rank for each in victims if (rank := number_of(each)) is not None], desired)
        grows = request.kind == "undrain" or (request.kind == "scale" and request.target > desired)
        said = []
        with self._faults.held(change.faults) as held:
            began = self._watch.act()
            operation = self._propose(request, change.within_s)
            for fault in change.faults:
                self._faults.wait_held(fault.at, began, change.within_s)
                said.append(f"at {fault.at}: {self._faults.inject_now(fault, last if grows else 0)}")
                held[fault.at].arm("")
        operation = self._end_of(operation, change.within_s)
        if change.ends not in ("any", operation.phase.value):
            raise ElasticError(f"it ended {operation.phase}: {operation.error or 'it should not have been done'}")
        took_ms = 1000 * (operation.finished - operation.started)
        return "; ".join((f"{request}: {operation.phase} after {took_ms:.0f} ms", *said))

    def _request(self, change: Change, slots: list[int], desired: int) -> Request:
        if change.kind == "scale":
            return scale(change.size_from(desired, self._first_size))
        if change.kind == "drain":
            return drain(*slots)
        return undrain(*(slots or sorted(self._drained)))

    def _propose(self, request: Request, within_s: float) -> Operation:
        """Propose it; while a repair or another operation goes on, try again."""

        def accepted() -> Operation | None:
            try:
                return self.target.client.propose(request, op_id=None, if_epoch=None, timeout_s=within_s)
            except OperationConflict:
                return None

        return self._watch.until(accepted, within_s, f"{request} to be accepted")

    def _end_of(self, operation: Operation, within_s: float) -> Operation:
        def ended() -> Operation | None:
            found = self.target.client.operation(operation.id)
            return None if found.active else found

        found = self._watch.until(ended, within_s + ENDED_S, f"operation {operation.id} to end")
        self.operations.append(found)
        if found.phase is Phase.DONE and found.kind == "drain":
            self._drained |= set(found.ranks)
        elif found.phase is Phase.DONE and found.kind == "undrain":
            self._drained -= set(found.ranks)
        return found

    def _restore(self) -> None:
        """What was drained is back, and the size is the first one."""
        requests = [undrain(*sorted(self._drained))] if self._drained else []
        if self.target.client.status()["desired"] + len(self._drained) != self._first_size:
            requests.append(scale(self._first_size))
        for request in requests:
            self.notify(f"as it was: {request}")
            self._end_of(self._propose(request, WHOLE_S), WHOLE_S)

    # --- the check

    def counts(self) -> dict[str, int]:
        """How many requests were not as they should be. A refused request was not admitted, and is not lost."""
        verdict = self.verdict()
        refused = sum(record.error.startswith("HTTP ") for record in self.history)
        counts = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "altered")}
        return {**counts, "lost": counts["lost"] - refused, "non_2xx": refused}

    def receipt(self) -> RunReceipt:
        """Check the finished run. Pure."""
        counts = self.counts()
        committed = [event.epoch for event in self.events if event.kind == "epoch_committed"]
        broken = [*self.unproven(), *self._beyond(counts)]
        if self.scenario.faults and not self.injected:
            broken.append("no fault was injected")
        if committed != sorted(set(committed)):
            broken.append(f"epochs do not rise: {committed}")
        return RunReceipt(
            **{**self.long_outcome(broken, len(set(committed))), **counts},
            scenario=self.scenario.name,
            rounds=self.rounds,
            faults=dict(Counter(fault.fault for fault in self.injected)),
            operations=dict(Counter(operation.phase.value for operation in self.operations)),
            whole_max_ms=round(max(self.whole_ms, default=0.0), 1),
            max_token_gap_ms=self.max_token_gap_ms(),
            replay=self.replay,
        )

    def _beyond(self, counts: dict[str, int]) -> list[str]:
        """What is more than it may be, with the requests that show it."""
        found: list[str] = []
        differences = self.verdict().differences
        for kind, count in counts.items():
            most = getattr(self.scenario.expect, kind)
            if most == "any" or count <= most:
                continue
            found.append(f"requests {kind.replace('_', '-')}: {count}, and at most {most} may be")
            shown = [d for d in differences if d.kind == ("lost" if kind == "non_2xx" else kind)][:SHOWN]
            found += [f"request {d.prompt} {d.kind}: {d.explanation}" for d in shown]
        return found


def in_words(requests: int, counts: dict[str, int]) -> str:
    """The counts of a run for people."""
    kinds = (f"{count} {'refused' if kind == 'non_2xx' else kind}" for kind, count in counts.items())
    return ", ".join((f"{requests} requests", *kinds))
