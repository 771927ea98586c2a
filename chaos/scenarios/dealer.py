"""Deals the faults of a run and takes them back: chooses victims, keeps within the limits, holds failpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from chaos.faults.base import Injected, Injector
from chaos.faults.catalogue import FAULTS
from chaos.scenarios.blast_radius import Limits, too_much
from chaos.scenarios.dry_run import CHAOS
from chaos.scenarios.keeping import Keeper
from chaos.scenarios.props import Props, Share
from chaos.scenarios.script import WAIT_S, Blow
from chaos.scenarios.verdict import Played
from chaos.scenarios.victims import Chooser
from chaos.scenarios.watch import Watch
from membership.base.errors import ElasticError, PlanRefused
from membership.base.failpoints import KIND


@dataclass(frozen=True)
class Open:
    """A fault that was dealt and lasts until it is taken back."""

    injector: Injector
    injected: Injected


class Dealer:
    """One run's."""

    def __init__(
        self, watch: Watch, chooser: Chooser, keeper: Keeper, played: Played, limits: Limits | None = None
    ) -> None:
        self._watch, self._keeper, self._played, self._limits = watch, keeper, played, limits
        self.chooser = chooser
        self._props = Props(watch.stage.site)
        self._open: list[Open] = []

    def choose(self, victim: str, after: int = 0) -> tuple[str, ...]:
        """The victims that are meant. `after`: the newest rank must be of a later incarnation; it is waited for."""
        if victim == "rank newest":
            self._watch.until(lambda: self._watch.newest_after(after), WAIT_S, "a newer rank with a process")
        return self.chooser.choose(victim, self._watch.sight())

    def blow(self, blow: Blow) -> str:
        """Deal it, at its failpoint if it has one; what happened, in words."""
        with self.held([blow]):
            if blow.at:
                self.wait_held(blow.at, self._watch.act(), WAIT_S)
            return self.deal(blow)

    def deal(self, blow: Blow, after: int = 0) -> str:
        """Deal it now."""
        victims = tuple(each for victim in blow.victims for each in self.choose(victim, after))
        if self._limits is not None:
            placement = self._watch.stage.client.view().placement
            if why := too_much(victims, self._watch.down() | self._struck(), placement, self._limits):
                raise PlanRefused(why)
        self._watch.guard()  # to choose may have taken long
        self._watch.act()
        dealt = [self._strike(blow, victim) for victim in victims]
        if blow.for_s:
            self._watch.pause(blow.for_s)
            for each in dealt:
                self._take_back(each)
        told = "; ".join(f"{each.injected.victim} ({each.injected.proof})" for each in dealt)
        return f"{blow.fault} {told}{f', for {blow.for_s:g} s' if blow.for_s else ''}"

    def heal(self, fault: str = "all") -> str:
        """Take back this fault, or all; whose, in words. One that cannot be taken back does not keep the others."""
        healed = [each for each in self._open if fault in ("all", each.injected.fault)]
        for each in healed:
            self._take_back(each)
        return ", ".join(f"{each.injected.fault} {each.injected.victim}" for each in healed)

    @contextmanager
    def held(self, blows: Sequence[Blow]) -> Iterator[dict[str, Share]]:
        """Whoever comes to the failpoints of these waits there, until its share is disarmed or the block is left."""
        self._let_go()
        shares = {blow.at: self._props.share() for blow in blows if blow.at}
        try:
            for point, share in shares.items():
                share.arm(f"{point}=hang")
            yield shares
        finally:
            for share in shares.values():
                share.arm("")

    def wait_held(self, point: str, since: float, within_s: float) -> None:
        """Until somebody has come to this failpoint since then."""
        name, _, rank = point.partition("@")

        def there() -> bool:
            passed = (e for e in self._watch.since(since) if e.kind == KIND and e.fields.get("name") == name)
            return any(rank in ("", str(event.rank)) for event in passed)

        self._watch.until(there, within_s, f"somebody at {point}")

    def remember(self) -> None:
        """Who is which process, for the time when the store does not answer."""
        self._props.remember(*(f"rank {rank}" for rank in self._watch.sight().ranks), "engine", "engine-standby")

    def _strike(self, blow: Blow, victim: str) -> Open:
        share = self._props.share()
        injector = self._watch.stage.make(blow.fault, share, victim, blow.params)
        found = Open(injector, injector.inject())
        share.settle()
        self._keeper.dealt(found.injected)
        self._played.faults.append(found.injected)
        if FAULTS[blow.fault].heals or CHAOS in FAULTS[blow.fault].needs:
            self._open.append(found)
        if not FAULTS[blow.fault].heals and victim.startswith("rank "):
            self._watch.died(int(victim.split()[1]))
        return found

    def _let_go(self) -> None:
        """Disarm what has ended its rank: the next one in the slot must not suffer it too."""
        for each in tuple(self._open):
            fault = each.injected
            ended = not FAULTS[fault.fault].heals and fault.victim.startswith("rank ")
            if ended and self._watch.replaced(int(fault.victim.split()[1])):
                self._take_back(each)

    def _take_back(self, found: Open) -> None:
        if found not in self._open:
            return
        self._open.remove(found)
        fault = found.injected
        try:
            found.injector.heal()
            self._keeper.healed(fault)
        except ElasticError as error:
            self._played.troubles.append(f"{fault.fault} {fault.victim} could not be taken back: {error}")

    def _struck(self) -> set[int]:
        """Ranks with a fault that lasts."""
        victims = (each.injected.victim for each in self._open)
        return {int(victim.split()[1]) for victim in victims if victim.startswith("rank ")}
