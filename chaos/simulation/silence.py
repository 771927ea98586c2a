"""Silent hosts: the shipped looks at a connection, which sees what the simulated network keeps back.

The product looks each 25 ms. Here that is done only while there is something to see: from a cut until what was sent
meanwhile has been acknowledged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos.simulation.network import RESEND_S, Way, resent_at
from membership.base.timing import REMOTE_SILENCE_S
from workers.queue.silence import LOOK_S, Acks, Connection, OtherHosts, Silence, look

if TYPE_CHECKING:
    from chaos.simulation.process import Process

RTT_S = 0.0005


class SimConnection(Connection):
    """As shipped, with a kernel that follows what the network does."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet = (0.0, -math.inf)  # (since when nothing is acknowledged, until when)

    def connected(self, connected: bool, now: float) -> None:
        """Whether packets get there and back from now on. What was kept back is acknowledged once it was sent again."""
        since, until = self._quiet
        if not connected:
            self._quiet = (since if now < until else now, math.inf)
        elif until == math.inf:
            self._quiet = (since, resent_at(since, now))

    def waited_s(self, now: float) -> float:
        """For how long nothing has been acknowledged."""
        since, until = self._quiet
        return now - since if now < until else 0.0

    def look(self, now: float) -> tuple[Silence, Acks] | None:
        """See workers/queue/silence.py."""
        if self.acks is None or now - self._silence.looked_at >= LOOK_S / 2:
            waited_s = self.waited_s(now)
            self.acks = Acks(waited_s > 0, waited_s, RTT_S, RTT_S / 4, backing_off=waited_s > RESEND_S)
            self._silence = look(self._silence, self.acks, now)
        return self._silence, self.acks


class Watch:
    """What a process's thread finds of the host at the other end of a connection, until it is silent or this stops."""

    def __init__(
        self,
        process: Process,
        there: str,
        on_silence: Callable[[float], None],
        others: OtherHosts | None = None,
        *,
        soon: bool = True,
    ) -> None:
        """`soon`: by acknowledgements, and not only by messages that do not come. `others`: as in the product."""
        self._process, self._there, self._network = process, there, process.cluster.network
        self._on_silence, self._others, self._soon = on_silence, others, soon
        self.connection = SimConnection()
        self._looks = self._over = False
        if process.at == there:
            return
        if others is not None:
            others.add(self.connection, there)
        self._network.on_change.append(self._changed)

    def stop(self) -> None:
        """The connection has ended."""
        if not self._over:
            self._over = True
            if self._others is not None:
                self._others.discard(self.connection)
            if self._changed in self._network.on_change:
                self._network.on_change.remove(self._changed)

    def _changed(self, way: Way) -> None:
        if {*way} != {self._process.at, self._there}:
            return
        self.connection.connected(self._network.connected(*way), self._process.clock.now)
        if not self._looks:
            self._looks = True
            self._process.after(LOOK_S, self._look)

    def _look(self) -> None:
        self._looks = False
        if self._over:
            return
        if not self._process.alive:
            return self.stop()
        now = self._process.clock.now
        silent_s = self._network.cut_s(self._there, self._process.at)
        if silent_s <= REMOTE_SILENCE_S:
            cut_off = self._others.cut_off if self._others is not None else lambda now: False
            silent_s = self.connection.silent_s(now, cut_off) if self._soon else 0.0
        if silent_s:
            self.stop()
            self._on_silence(silent_s)
        elif self.connection.waited_s(now):
            self._looks = True
            self._process.after(LOOK_S if self._soon else REMOTE_SILENCE_S / 10, self._look)
