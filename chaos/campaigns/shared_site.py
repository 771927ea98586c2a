"""A site that many injectors use at once, also while the store is away.

Each gets a share of it: what one arms does not disarm what another did, and a process that is just being started is
waited for. While the store does not answer, the processes that were last known count as long as they live.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from chaos.campaigns.targets import is_alive
from chaos.faults.base import NotInjected, Site
from chaos.target.waiting import until
from membership.base.errors import ElasticError, NoAnswer, WaitTimeout
from membership.base.events import Event

APPEAR_S = 20.0  # a role or a rank that was killed is back by then
POLL_S = 0.02
UNKNOWN = -1  # the store does not answer, and the process was not looked up before


class SharedSite:
    """The processes of each victim, and what each share has armed."""

    def __init__(self, site: Site, sleep: Callable[[float], None] = time.sleep) -> None:
        self.site = site
        self._sleep = sleep
        self._armed: dict[int, str] = {}  # share -> its failpoints
        self._written: str | None = ""  # None: more than is to be armed from now on
        self._known: dict[str, psutil.Process] = {}
        self._shares = 0

    def share(self) -> Share:
        """One more injector's."""
        self._shares += 1
        return Share(self, self._shares)

    def arm(self, share: int, failpoints: str) -> None:
        """What this share has armed is now this."""
        self._armed[share] = failpoints
        wanted = ";".join(filter(None, self._armed.values()))
        if wanted != self._written:
            self.site.arm(wanted)
            self._written = wanted

    def settle(self, share: int) -> None:
        """What this share has armed has happened.

        A fault of one time must not happen again when another share arms: it is left out from now on. A hang stays.
        """
        parts = self._armed.get(share, "").split(";")
        lasting = [part for part in parts if part and ("=1*" not in part or "hang" in part)]
        if ";".join(lasting) != self._armed.get(share, ""):
            self._armed[share] = ";".join(lasting)
            self._written = None

    def remember(self, *victims: str) -> None:
        """Look up their processes, for the time when the store does not answer. Those without one are left out."""
        for victim in victims:
            try:
                self._known[victim] = psutil.Process(self.site.pid(victim))
            except (NotInjected, psutil.NoSuchProcess):
                self._known.pop(victim, None)
            except NoAnswer:
                return  # that time has come

    def pid(self, victim: str) -> int:
        """The process of the victim, once one is alive. NotInjected if none appears, NoAnswer if unknown."""
        why: list[ElasticError] = []

        def found() -> int:
            try:
                pid = self.site.pid(victim)
            except NotInjected as error:
                why[:] = [error]
                return 0
            except NoAnswer as error:
                known = self._known.get(victim)
                why[:] = [error]
                return known.pid if known is not None and known.is_running() and is_alive(known.pid) else UNKNOWN
            why[:] = [NotInjected(f"the process of {victim} ({pid}) is gone")]
            return pid if is_alive(pid) else 0

        with suppress(WaitTimeout):
            pid = until(found, f"a process of {victim}", APPEAR_S, poll_s=POLL_S, sleep=self._sleep)
            if pid != UNKNOWN:
                return pid
        raise why[0]


class Share:
    """A site for one injector."""

    def __init__(self, shared: SharedSite, number: int) -> None:
        self._shared, self._number = shared, number

    def pid(self, victim: str) -> int:
        return self._shared.pid(victim)

    def arm(self, failpoints: str) -> None:
        """Arm these, and leave what others armed."""
        self._shared.arm(self._number, failpoints)

    def settle(self) -> None:
        self._shared.settle(self._number)

    def events(self) -> list[Event]:
        return self._shared.site.events()

    def state_dir(self) -> Path:
        return self._shared.site.state_dir()

    def url(self) -> str:
        return self._shared.site.url()
