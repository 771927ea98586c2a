"""The faults of a scenario's run: chooses victims, keeps within the limits, injects, holds failpoints, heals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from chaos.campaigns.shared_site import Share, SharedSite
from chaos.campaigns.watch import Watch
from chaos.faults.base import Injected, Injector
from chaos.faults.catalogue import FAULTS
from chaos.record.recorder import Recorder
from chaos.scenarios.blast_radius import Limits, too_much
from chaos.scenarios.script import CHAOS, WAIT_S, Inject
from chaos.scenarios.victims import Chooser, number_of
from membership.base.errors import ElasticError, PlanRefused
from membership.base.failpoints import KIND


@dataclass(frozen=True)
class Lasting:
    """A fault that lasts until it is healed."""

    injector: Injector
    injected: Injected


@dataclass
class Faults:
    """Those of one run."""

    watch: Watch
    chooser: Chooser
    recorder: Recorder
    limits: Limits | None = None
    injected: list[Injected] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)  # faults that could not be healed
    _lasting: list[Lasting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._site = SharedSite(self.watch.target.site)

    def choose(self, victim: str, after: int = 0) -> tuple[str, ...]:
        """The victims that are meant. `after`: the newest rank must be of a later incarnation; it is waited for."""
        if victim == "rank newest":
            self.watch.until(lambda: self.watch.newest_after(after), WAIT_S, "a newer rank with a process")
        return self.chooser.choose(victim, self.watch.sight())

    def inject(self, step: Inject) -> str:
        """Inject it, at its failpoint if it has one; what happened, in words."""
        with self.held([step]):
            if step.at:
                self.wait_held(step.at, self.watch.act(), WAIT_S)
            return self.inject_now(step)

    def inject_now(self, step: Inject, after: int = 0) -> str:
        """Inject it now."""
        victims = tuple(each for victim in step.victims for each in self.choose(victim, after))
        if self.limits is not None:
            placement = self.watch.target.client.view().placement
            if why := too_much(victims, self.watch.down() | self._lasting_ranks(), placement, self.limits):
                raise PlanRefused(why)
        self.watch.guard()  # to choose may have taken long
        self.watch.act()
        found = [self._inject(step, victim) for victim in victims]
        if step.for_s:
            self.watch.pause(step.for_s)
            for each in found:
                self._heal(each)
        proofs = "; ".join(f"{each.injected.victim} ({each.injected.proof})" for each in found)
        return f"{step.fault} {proofs}{f', for {step.for_s:g} s' if step.for_s else ''}"

    def heal(self, fault: str = "all") -> str:
        """Heal this fault, or all; which, in words. One that cannot be healed does not keep the others."""
        healed = [each for each in self._lasting if fault in ("all", each.injected.fault)]
        for each in healed:
            self._heal(each)
        return ", ".join(f"{each.injected.fault} {each.injected.victim}" for each in healed)

    @contextmanager
    def held(self, steps: Sequence[Inject]) -> Iterator[dict[str, Share]]:
        """Processes that come to the failpoints of these wait there, until its share is disarmed or the block ends."""
        self._disarm_replaced()
        shares = {step.at: self._site.share() for step in steps if step.at}
        try:
            for point, share in shares.items():
                share.arm(f"{point}=hang")
            yield shares
        finally:
            for share in shares.values():
                share.arm("")

    def wait_held(self, point: str, since: float, within_s: float) -> None:
        """Until a process has come to this failpoint since then."""
        name, _, rank = point.partition("@")

        def there() -> bool:
            passed = (e for e in self.watch.since(since) if e.kind == KIND and e.fields.get("name") == name)
            return any(rank in ("", str(event.rank)) for event in passed)

        self.watch.until(there, within_s, f"a process at {point}")

    def remember(self) -> None:
        """Look up the processes, for the time when the store does not answer."""
        self._site.remember(*(f"rank {rank}" for rank in self.watch.sight().ranks), "engine", "engine-standby")

    def _inject(self, step: Inject, victim: str) -> Lasting:
        share = self._site.share()
        injector = self.watch.target.injector(step.fault, share, victim, step.params)
        found = Lasting(injector, injector.inject())
        share.settle()
        self.recorder.injected(found.injected)
        self.injected.append(found.injected)
        if FAULTS[step.fault].heals or CHAOS in FAULTS[step.fault].needs:
            self._lasting.append(found)
        rank = number_of(victim)
        if rank is not None and not FAULTS[step.fault].heals:
            self.watch.died(rank)
        return found

    def _disarm_replaced(self) -> None:
        """Disarm the failpoints that have ended their rank: its successor must not suffer the fault, too."""
        for each in tuple(self._lasting):
            rank = number_of(each.injected.victim)
            if rank is not None and not FAULTS[each.injected.fault].heals and self.watch.replaced(rank):
                self._heal(each)

    def _heal(self, found: Lasting) -> None:
        if found not in self._lasting:
            return
        self._lasting.remove(found)
        fault = found.injected
        try:
            found.injector.heal()
            self.recorder.healed(fault)
        except ElasticError as error:
            self.troubles.append(f"{fault.fault} {fault.victim} could not be taken back: {error}")

    def _lasting_ranks(self) -> set[int]:
        numbers = (number_of(each.injected.victim) for each in self._lasting)
        return {number for number in numbers if number is not None}
