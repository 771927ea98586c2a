"""A site that many injectors use at once, also while the store is away.

Each gets a share of it: what one arms does not disarm what another did, and a process that is just being started is
waited for. Of a store that does not answer, the last that was known of its processes holds as long as they live.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from chaos.faults.base import NotInjected, Site
from membership.base.errors import NoAnswer
from membership.base.events import Event

APPEAR_S = 20.0  # a role or a rank that was killed is back by then
POLL_S = 0.02


class Props:
    """Who is which process, and what is armed by whom."""

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
        """What this share has armed has happened. What was to happen once must not do so again when others arm: then it
        is left out. A hang stays, as long as it is to last."""
        parts = self._armed.get(share, "").split(";")
        lasting = [part for part in parts if part and ("=1*" not in part or "hang" in part)]
        if ";".join(lasting) != self._armed.get(share, ""):
            self._armed[share] = ";".join(lasting)
            self._written = None

    def remember(self, *victims: str) -> None:
        """Who they are, for the time when nobody can be asked; those that are not there are left out."""
        for victim in victims:
            try:
                self._known[victim] = psutil.Process(self.site.pid(victim))
            except (NotInjected, psutil.NoSuchProcess):
                self._known.pop(victim, None)
            except NoAnswer:
                return  # that time has come

    def pid(self, victim: str) -> int:
        """The process of the victim, once there is one that lives."""
        deadline = time.monotonic() + APPEAR_S
        while True:
            try:
                found = self.site.pid(victim)
                if _lives(found):
                    return found
                why = NotInjected(f"the process of {victim} ({found}) is gone")
            except NotInjected as error:
                why = error
            except NoAnswer:
                known = self._known.get(victim)
                if known is not None and known.is_running() and _lives(known.pid):
                    return known.pid
                raise
            if time.monotonic() > deadline:
                raise why
            self._sleep(POLL_S)


class Share:
    """A site for one injector."""

    def __init__(self, props: Props, number: int) -> None:
        self._props, self._number = props, number

    def pid(self, victim: str) -> int:
        """The process of the victim."""
        return self._props.pid(victim)

    def arm(self, failpoints: str) -> None:
        """Arm these, and leave what others armed."""
        self._props.arm(self._number, failpoints)

    def settle(self) -> None:
        """What was armed has happened."""
        self._props.settle(self._number)

    def events(self) -> list[Event]:
        """The history so far."""
        return self._props.site.events()

    def state_dir(self) -> Path:
        """The cluster's state directory."""
        return self._props.site.state_dir()

    def url(self) -> str:
        """Base URL of its API."""
        return self._props.site.url()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
