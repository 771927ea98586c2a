"""A controller process: lease, election, planner and transactions as shipped, one decision at a time.

Time passes between a decision and its transaction, in which it may be stopped or die at a failpoint.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from chaos.simulation.invariants import idle
from chaos.simulation.process import Process
from membership.base.errors import Fenced, LeaseLost, StoreError, StoreUnavailable, WaitTimeout
from membership.planning.controller import Term, edge
from membership.planning.own_times import OwnTimes
from membership.planning.planner import Effect, due
from membership.store.codec import encode
from membership.store.election import Election
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import ClusterState, LeaderRecord

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster

Decided = tuple[ClusterState, float]
"""The state and the time in which something was decided, both as the controller saw them."""
LOOK_S, THINK_S = 0.5, (0.001, 0.02)
STANDBY_S = 0.3


class ControllerProcess(Process):
    """One controller process."""

    def __init__(self, cluster: Cluster, number: int, at: str) -> None:
        super().__init__(cluster, f"controller {number}", at)
        self.mirror: Mirror | None = None
        self.election: Election | None = None
        self.past: deque[tuple[Effect, ClusterState, Term, Election, Decided]] = deque(maxlen=8)
        self._keeper: LeaseKeeper | None = None
        self._term: Term | None = None
        self._times = OwnTimes()
        self._written = 0  # the mirror must have reached this before the next look
        self._wait_until = 0.0
        self._acting = False
        self.decided: Decided | None = None  # of the transaction under way
        self.decided_in: Election | None = None  # the term: a late one is of a term that it may have left
        self.after(self.random.uniform(0.0, 0.05), self._tick)

    @property
    def leads(self) -> bool:
        """Whether it believes that it leads."""
        return self.election is not None and self.election.held

    def turn(self) -> None:
        """Campaign, or decide once. It does nothing else between a decision and its transaction."""
        if self._acting:
            return
        try:
            if self.mirror is None:
                self.mirror = Mirror(self.client, self.cluster.keys.cluster, clock=self.clock, background=False)
            self.client.follow(self.mirror)
            if self._keeper is None or self._term is None or self.election is None:
                self._stand(self.mirror)
            elif not self.election.token:
                self._term.own(self.mirror.state(), self.wall())
                self.cluster.elected("controller", self.election.campaign(0.0))
                self.wake()
            elif not self.election.held:
                raise LeaseLost("our lease has run out")
            else:
                self._look(self.mirror, self._term, self.election)
        except (StoreUnavailable, WaitTimeout):
            return
        except (Fenced, LeaseLost):
            self._stand_down()

    def _stand(self, mirror: Mirror) -> None:
        ttl_s = self.cluster.config.lease_ttl_s
        self._keeper = LeaseKeeper(self.client, ttl_s, self.clock, background=False)
        value = encode(LeaderRecord(node=self.name, pid=1))
        self.election = Election(self.client, self.cluster.keys.leader, value, self._keeper)
        name, stop = self.cluster.keys.cluster, threading.Event()
        self._term = Term(self.client, name, self.name, stop, self.cluster.events, self.wall, mirror, self._times)
        self.after(ttl_s / 3, self._renew, self._keeper)
        self.wake()

    def _look(self, mirror: Mirror, term: Term, election: Election) -> None:
        state, now = mirror.state(), self.wall()
        if state.revision < self._written and self.clock.now < self._wait_until:
            return
        effects = term.decide(state, election, now)
        own = term.own(state, now)
        if effects == []:
            self.cluster.report_all(idle(own, now))
        for effect in effects or ():
            self._acting = True
            self.past.append((effect, state, term, election, (own, now)))
            think_s = self.random.uniform(*THINK_S)
            hang_s = self.cluster.failpoints.hang_s(f"controller.before.{edge(effect)}")
            if hang_s:
                self.cluster.freeze(self, hang_s)
            self.after(think_s, self._apply, effect, state, term, election, (own, now))
        if not effects and (at := due(own, now)) is not None and at - now < LOOK_S:
            self.wake(max(0.001, at - now))

    def _apply(self, effect: Effect, state: ClusterState, term: Term, election: Election, decided: Decided) -> None:
        self._acting = False
        point = f"controller.after.{edge(effect)}"
        try:
            with self._deciding(decided, election):
                self._written = max(term.apply(effect, state, election), state.revision + 1)
            self._wait_until = self.clock.now + LOOK_S
        except StoreUnavailable:
            self._wait_until = 0.0
            self.wake(0.2)
            return
        except (Fenced, LeaseLost):
            self._stand_down()
            return
        hang_s = self.cluster.failpoints.hang_s(point)
        if hang_s:
            self.cluster.freeze(self, hang_s)
        self.wake()

    def repeat(self, effect: Effect, state: ClusterState, term: Term, election: Election, decided: Decided) -> None:
        with suppress(Fenced, StoreError), self._deciding(decided, election):
            term.apply(effect, state, election)

    @contextmanager
    def _deciding(self, decided: Decided, election: Election) -> Iterator[None]:
        """Attribute what is written meanwhile to this decision."""
        self.decided, self.decided_in = decided, election
        try:
            yield
        finally:
            self.decided, self.decided_in = None, None

    def _renew(self, keeper: LeaseKeeper) -> None:
        pause = keeper.turn() if keeper is self._keeper else None
        if pause is not None:
            self.after(pause, self._renew, keeper)

    def _stand_down(self) -> None:
        keeper, self._keeper, self._term, self.election, self._acting = self._keeper, None, None, None, False
        if keeper is not None:
            keeper.close()

    def _tick(self) -> None:
        self.turn()
        self.after(LOOK_S if self.leads else STANDBY_S, self._tick)
