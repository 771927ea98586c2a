"""Plays a scenario: load, steps with a deadline each, everything taken back in the end, and what came of it.

The decisions (whom to strike, what is too much, what is broken) are pure and stand in `chaos/scenarios/`; this is the
loop that carries them out. Whatever ends a run (a refusal, a passed deadline, Ctrl-C), its faults are taken back first.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chaos.campaigns.endurance import Tell
from chaos.scenarios.blast_radius import Limits
from chaos.scenarios.dealer import Dealer
from chaos.scenarios.keeping import Keeper
from chaos.scenarios.script import BACK, Blow, Change, Heal, Release, Step, Wait
from chaos.scenarios.verdict import Played
from chaos.scenarios.victims import Chooser
from chaos.scenarios.watch import Interrupted, Streaming, TooFar, Watch
from chaos.target.stage import Stage, model_of
from chaos.workload.streams import PROMPTS, Workload
from membership.base.errors import ElasticError, OperationConflict
from membership.operations.change import Change as ClusterChange
from membership.operations.change import drain, scale, undrain
from membership.store.records import Operation, Phase

START_S = 120.0
END_S = 120.0
ENDED_S = 30.0  # after its deadline an operation has ended


class Player:
    """Plays one scenario on one cluster. `limits`: of a running deployment; `confirm` is asked before each deed."""

    def __init__(
        self,
        played: Played,
        stage: Stage,
        keeper: Keeper,
        *,
        tell: Tell,
        stop: threading.Event,
        limits: Limits | None = None,
        confirm: Callable[[str], bool] = lambda deed: True,
    ) -> None:
        self.played, self._stage, self._keeper = played, stage, keeper
        self._tell, self._limits, self._confirm = tell, limits, confirm
        self._watch = Watch(stage, stop, limits)
        self._dealer = Dealer(self._watch, Chooser(random.Random(played.seed)), keeper, played, limits)
        self._drained: set[int] = set()
        self._first_size = 0

    def play(self) -> None:
        """All of it. What could not be done is among the troubles; only an interruption is raised."""
        self._watch.until(self._watch.is_whole, START_S, "whole at the start")
        self._first_size = self._stage.client.status()["desired"]
        self._watch.since(time.time())
        self._watch.history.clear()  # what was before the run
        with self._under_load() as workload:
            try:
                self._steps(workload)
            except Interrupted:
                raise
            except ElasticError as error:
                self.played.troubles.append(f"{error} ({error.hint})" if error.hint else str(error))
                self._tell(f"stopped: {error}")
            finally:
                if healed := self._dealer.heal():
                    self._tell(f"taken back: {healed}")
                self._watch.relax()
            self._clean_up()

    @contextmanager
    def _under_load(self) -> Iterator[Workload]:
        """The fault-free run first; then streams for the length of the block."""
        load, seed = self.played.scenario.load, self.played.seed
        url, model = self._stage.url, model_of(self._stage.url)
        prompts = PROMPTS[: load.prompts]

        def streams() -> Workload:
            return Workload(
                url, model, prompts=prompts, concurrency=load.streams, max_tokens=load.max_tokens, seed=seed
            )

        oracle, workload = streams(), streams()
        self._tell("fault-free run of every prompt (the oracle)")
        self.played.oracle = {record.prompt: record for record in oracle.run_once()}
        self._keeper.expected(self.played.oracle.values())
        started = time.monotonic()
        workload.start()
        try:
            yield workload
        finally:
            self.played.history = workload.stop()
            self.played.seconds = time.monotonic() - started
            self._keeper.answered(self.played.history)
            self._watch.since(time.time())
            self.played.events = self._watch.history

    def _steps(self, workload: Workload) -> None:
        scenario = self.played.scenario
        self._await(Wait(state="streaming"), workload)
        for turn in range(1, scenario.repeat + 1):
            self._dealer.chooser.next_round()
            for number, step in enumerate(scenario.steps, start=1):
                name = f"{turn}.{number}" if scenario.repeat > 1 else str(number)
                self._watch.guard()
                if not isinstance(step, Wait | Heal) and not self._confirm(step.words):
                    raise Interrupted(f"step {name} ({step.words}) was declined; every fault was taken back")
                try:
                    self._tell(f"{name} {self._do(step, workload)}")
                except (Interrupted, TooFar):
                    raise
                except ElasticError as error:
                    raise ElasticError(f"step {name} ({step.words}): {error}", hint=error.hint) from error
            self.played.rounds = turn

    def _do(self, step: Step, workload: Workload) -> str:
        """Do one step; what came of it, in words."""
        match step:
            case Blow():
                self._dealer.remember()
                return self._dealer.blow(step)
            case Wait():
                return self._await(step, workload)
            case Change():
                return self._change(step)
            case Release():
                (victim,) = self._dealer.choose(step.victim)
                self._watch.act()
                self._stage.client.unquarantine(int(victim.split()[1]))
                return f"unquarantine {victim}"
            case Heal():
                self._watch.act()
                return f"taken back: {self._dealer.heal(step.fault) or 'nothing'}"

    # --- waits

    def _await(self, wait: Wait, workload: Workload) -> str:
        began = time.monotonic()
        if wait.seconds:
            self._watch.pause(wait.seconds)
            return wait.words
        if wait.event:
            self._watch.until(lambda: self._has_happened(wait), wait.within_s, f"event {wait.words[9:]}")
        elif wait.state == "whole":
            self._watch.until(self._watch.is_whole, wait.within_s, "whole")
            self.played.whole_ms.append(1000 * (time.time() - self._watch.acted_at))
            return (
                f"whole {self.played.whole_ms[-1]:.0f} ms after the last deed; {len(workload.records())} requests ended"
            )
        elif wait.state == "streaming":
            self._watch.until(Streaming(workload), wait.within_s, "a token in every stream")
        elif wait.state == "serving":
            self._watch.until(lambda: self._is("serving", "degraded"), wait.within_s, "serving")
        else:
            self._watch.until(lambda: self._is(wait.state), wait.within_s, wait.state)
        return f"{wait.state or wait.event} after {1000 * (time.monotonic() - began):.0f} ms"

    def _is(self, *states: str) -> bool:
        return self._stage.client.status()["state"] in states

    def _has_happened(self, wait: Wait) -> bool:
        wanted = dict(wait.fields)
        rank = wanted.pop("rank", None)
        if rank == "same":
            rank = self._dealer.chooser.last
        found = (event for event in self._watch.since(self._watch.acted_at) if event.kind == wait.event)
        return any(rank in (None, event.rank) and wanted.items() <= event.fields.items() for event in found)

    # --- changes

    def _change(self, change: Change) -> str:
        desired = self._stage.client.status()["desired"]
        last = self._watch.incarnation(self._watch.sight().newest)
        victims = [each for victim in change.victims if victim != BACK for each in self._dealer.choose(victim)]
        request = self._request(change, [int(each.split()[1]) for each in victims], desired)
        grows = request.kind == "undrain" or (request.kind == "scale" and request.target > desired)
        told = []
        with self._dealer.held(change.strikes) as held:
            began = self._watch.act()
            operation = self._propose(request, change.within_s)
            for strike in change.strikes:
                self._dealer.wait_held(strike.at, began, change.within_s)
                told.append(f"at {strike.at}: {self._dealer.deal(strike, last if grows else 0)}")
                held[strike.at].arm("")
        operation = self._end_of(operation, change.within_s)
        if change.ends not in ("any", operation.phase.value):
            raise ElasticError(f"it ended {operation.phase}: {operation.error or 'it should not have been done'}")
        took_ms = 1000 * (operation.finished - operation.started)
        return "; ".join((f"{request}: {operation.phase} after {took_ms:.0f} ms", *told))

    def _request(self, change: Change, slots: list[int], desired: int) -> ClusterChange:
        if change.kind == "scale":
            return scale(change.size_from(desired, self._first_size))
        if change.kind == "drain":
            return drain(*slots)
        return undrain(*(slots or sorted(self._drained)))

    def _propose(self, request: ClusterChange, within_s: float) -> Operation:
        """Ask for it; a repair that goes on is waited for, as is an operation that is just ending."""

        def asked() -> Operation | None:
            try:
                return self._stage.client.propose(request, op_id=None, if_epoch=None, timeout_s=within_s)
            except OperationConflict:
                return None

        return self._watch.until(asked, within_s, f"{request} to be accepted")

    def _end_of(self, operation: Operation, within_s: float) -> Operation:
        def ended() -> Operation | None:
            found = self._stage.client.operation(operation.id)
            return None if found.active else found

        found = self._watch.until(ended, within_s + ENDED_S, f"operation {operation.id} to end")
        self.played.operations.append(found)
        if found.phase is Phase.DONE and found.kind == "drain":
            self._drained |= set(found.ranks)
        elif found.phase is Phase.DONE and found.kind == "undrain":
            self._drained -= set(found.ranks)
        return found

    # --- the end

    def _clean_up(self) -> None:
        """Of a running deployment: as it was before. Of any: every rank serves. What is not so is a trouble."""
        try:
            if self._limits is not None:
                self._restore()
            self._watch.until(self._watch.is_whole, END_S, "whole in the end")
        except Interrupted:
            raise
        except ElasticError as error:
            self.played.troubles.append(str(error))

    def _restore(self) -> None:
        """What was drained is back, and the size is the first one."""
        requests = [undrain(*sorted(self._drained))] if self._drained else []
        if self._stage.client.status()["desired"] + len(self._drained) != self._first_size:
            requests.append(scale(self._first_size))
        for request in requests:
            self._tell(f"as it was: {request}")
            self._end_of(self._propose(request, END_S), END_S)
