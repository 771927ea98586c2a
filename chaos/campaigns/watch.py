"""What a scenario's run sees of its target, and how it waits: each wait looks out for harm and for Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from chaos.campaigns.campaign import Interrupted
from chaos.campaigns.targets import Target, unready
from chaos.scenarios.blast_radius import Limits
from chaos.scenarios.victims import Sight
from chaos.target.waiting import until
from chaos.workload.streams import Workload
from membership.base.errors import ElasticError, NoAnswer
from membership.base.events import Event

POLL_S = 0.02
PROBE_EVERY_S = 0.5
SILENCE_S = 3.0  # a question that is not answered takes seconds
T = TypeVar("T")


class TooFar(ElasticError):
    """A running deployment suffers more than it may: the run ends here."""


class Watch:
    """Looks at the cluster, and keeps its history since the run began."""

    def __init__(self, target: Target, stop: threading.Event, limits: Limits | None) -> None:
        self.target, self._stop, self._limits = target, stop, limits
        self.history: list[Event] = []
        self.acted_at = time.time()  # the last action
        self.dead: dict[int, int] = {}  # rank -> the incarnation that was killed
        self._seen = Sight(())
        self._silent_at = -SILENCE_S
        self._incarnations: dict[int, int] = {}
        self._began = time.monotonic()
        self._unready_since: float | None = None
        self._probed_at = 0.0

    # --- waiting

    def until(self, sign: Callable[[], T | None], within_s: float, what: str) -> T:
        """The first true answer; WaitTimeout says what was waited for."""
        return until(sign, what, within_s, poll_s=POLL_S, guard=self.guard, sleep=self._stop.wait)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, seconds + 60.0, "the time to pass")

    def guard(self) -> None:
        """Interrupted if the user wants the end; TooFar if a running deployment has suffered enough."""
        if self._stop.is_set():
            raise Interrupted("interrupted; every fault was taken back")
        if self._limits is None:
            return
        now = time.monotonic()
        if now - self._began > self._limits.max_seconds:
            raise TooFar(f"{self._limits.max_seconds:g} s have passed, and it may not last longer (--max-seconds)")
        if now - self._probed_at >= PROBE_EVERY_S:
            self._probed_at = now
            why = unready(self.target.url)
            self._unready_since = (self._unready_since or now) if why else None
        if self._unready_since is not None and now - self._unready_since > self._limits.max_unready_s:
            most = self._limits.max_unready_s
            raise TooFar(f"not ready for more than {most:g} s, and it may not be for longer (--max-unready)")

    def act(self) -> float:
        """An action begins: waits from now on are for what comes after it. Returns the time."""
        self.acted_at = time.time()
        return self.acted_at

    def relax(self) -> None:
        """Nothing more will be done: drop the limits, and let the cluster recover."""
        self._limits = None

    # --- seeing

    def since(self, at: float) -> list[Event]:
        """Events that came after this time."""
        self.history += self.target.events()
        first = len(self.history)
        while first and self.history[first - 1].ts >= at - 1.0:  # several processes write: not quite in order
            first -= 1
        return [event for event in self.history[first:] if event.ts >= at]

    def sight(self) -> Sight:
        """The ranks now; as they were, if the store does not answer (then it is not asked again at once)."""
        if time.monotonic() - self._silent_at < SILENCE_S:
            return self._seen
        try:
            status, view = self.target.client.status(), self.target.client.view()
        except NoAnswer:
            self._silent_at = time.monotonic()
            return self._seen
        self._incarnations = {each["rank"]: each["incarnation"] for each in status["ranks"]}
        running = [each for each in status["ranks"] if each["pid"]]
        newest = max(running, key=lambda each: int(each["incarnation"]), default=None)
        self._seen = Sight(view.ranks, newest["rank"] if newest else None, view.placement)
        return self._seen

    def incarnation(self, rank: int | None) -> int:
        """Of this rank, at the last sight; 0: it had none."""
        return self._incarnations.get(rank, 0) if rank is not None else 0

    def newest_after(self, incarnation: int) -> bool:
        """Whether there is a rank of a later incarnation than this with a process."""
        return self.incarnation(self.sight().newest) > incarnation

    def down(self) -> set[int]:
        """Ranks that do not serve now."""
        return {each["rank"] for each in self.target.client.status()["ranks"] if each["state"] != "serving"}

    def died(self, rank: int) -> None:
        """The rank's present incarnation was killed; its successors are later."""
        self.dead[rank] = max(self.dead.get(rank, 0), self.incarnation(rank))

    def replaced(self, rank: int) -> bool:
        """Whether the slot of a rank that was killed has another process."""
        self.sight()
        return self.incarnation(rank) > self.dead.get(rank, 0)

    def is_whole(self) -> bool:
        """Every rank that is wanted serves, none of them one that was killed, and nothing else goes on."""
        status = self.target.client.status()
        return bool(
            status["state"] == "serving"
            and status["operation"] is None
            and len(status["ranks"]) == status["desired"]
            and all(self._serves(each) for each in status["ranks"])
            and self.target.settled(status)
        )

    def _serves(self, rank: Mapping[str, Any]) -> bool:
        return rank["state"] == "serving" and int(rank["incarnation"]) > self.dead.get(rank["rank"], 0)


class Streaming:
    """Whether every stream has brought a token since this was made."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._before = workload.open_streams()
        self._moved: set[int] = set()

    def __call__(self) -> bool:
        now = self._workload.open_streams()
        self._moved |= {stream for stream, tokens in now.items() if tokens and self._before.get(stream) != tokens}
        return len(self._moved) == self._workload.concurrency
