"""Keeps one lease alive, and knows by this process's own clock whether it certainly still holds.

The deadline counts from *before* a renewal was sent: however late the answer, the store cannot have expired the lease
earlier than that. Code that relies on the lease must check `alive` each time; `on_lost` is called once.

It lasts the longer the slower the store answers (`fitting_ttl_s`): from when it is granted, and, if its holder can
`carry` its keys to another lease, whenever that pace changes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from membership.base.errors import LeaseLost, StoreError, StoreUnavailable, WaitTimeout
from membership.store.interface import Store
from membership.store.pace import fitting_ttl_s, renewal_timeout_s

CLOSE_TIMEOUT_S = 10.0
RETRY_S = 0.1

log = structlog.get_logger(__name__)


class LeaseKeeper:
    """Grants a lease and renews it three times per time to live. A lost lease stays lost: make a new keeper.

    A `persistent` keeper goes on trying past its deadline, until the store reports that the lease has ended: after an
    outage the store gives leases their full time again. `alive` is False meanwhile.
    """

    def __init__(
        self,
        store: Store,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_lost: Callable[[], None] | None = None,
        background: bool = True,
        persistent: bool = False,
    ) -> None:
        self._store = store
        self._clock = clock
        self._configured_s = ttl_s
        self._ttl_s = fitting_ttl_s(ttl_s, store.pace_s)
        self.on_lost = on_lost
        self.carry: Callable[[int], None] | None = None
        """Puts the holder's keys under another lease, in its thread; LeaseLost if they are not ours any more."""
        self.on_carried: Callable[[], None] | None = None  # in that thread: what else is under the lease has to follow
        self._carrying: tuple[int, ...] = ()  # leases that the keys may be under by now: their carries had no answer
        self._persistent = persistent
        self._lost = False
        self._unanswered = 0  # renewals, since one that was answered
        self._stop = threading.Event()
        before = clock()
        self.lease = store.grant(self._ttl_s)
        self._deadline = before + self._ttl_s
        self._thread = threading.Thread(target=self._run, name=f"lease-{self.lease:x}", daemon=True)
        if background:
            self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the lease certainly still holds."""
        return not self._lost and self._clock() < self._deadline

    @property
    def remaining_s(self) -> float:
        """How much longer the lease certainly holds."""
        return 0.0 if self._lost else max(0.0, self._deadline - self._clock())

    def renew(self) -> bool:
        """Renew once; return whether the store confirmed it. LeaseLost: the lease has ended, or its deadline passed."""
        before = self._clock()
        timeout_s = renewal_timeout_s(self._ttl_s, self._unanswered)
        if not self._persistent:
            timeout_s = min(timeout_s, self._deadline - before)
        if timeout_s <= 0:
            raise LeaseLost(f"lease {self.lease:x} was not renewed within its {self._ttl_s:g} s")
        try:
            ttl_s = self._store.keepalive(self.lease, timeout_s)
        except StoreUnavailable as error:
            self._unanswered += 1
            log.warning("lease_not_renewed", lease=f"{self.lease:x}", remaining_s=self.remaining_s, error=str(error))
            return False
        self._unanswered = 0
        if not self._carrying:
            self._deadline = max(self._deadline, before + min(ttl_s, self._ttl_s))
        return True

    def _fit(self) -> None:
        """Go over to a lease that fits the store's pace. The old one, which has no keys then, is left to end.

        As long as it is not known under which lease the keys are, none counts for longer than the shorter.
        """
        ttl_s = fitting_ttl_s(self._configured_s, self._store.pace_s, self._ttl_s)
        fits = ttl_s == self._ttl_s and not self._carrying
        if fits or self.carry is None or self._stop.is_set():
            return
        before = self._clock()
        lease = self._store.grant(ttl_s)
        if self._stop.is_set():  # `close` waits for one call, not for three
            return
        self._carrying, self._deadline = (*self._carrying, lease), min(self._deadline, before + ttl_s)
        self.carry(lease)
        self.lease, self._ttl_s, self._deadline, self._carrying = lease, ttl_s, before + ttl_s, ()
        log.info("lease_fitted", lease=f"{lease:x}", ttl_s=ttl_s, pace_s=round(self._store.pace_s, 3))
        if self.on_carried is not None:
            self.on_carried()

    def close(self, revoke: bool = True) -> None:
        """Stop renewing; revoke the lease, which deletes its keys, unless `revoke` is False."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                raise WaitTimeout(f"keeper of lease {self.lease:x} did not stop within {CLOSE_TIMEOUT_S:g} s")
        if revoke and not self._lost:
            self._lost = True
            try:
                for lease in (*self._carrying, self.lease):
                    self._store.revoke(lease)
            except StoreError as error:
                log.warning("lease_not_revoked", lease=f"{self.lease:x}", error=str(error))

    def __enter__(self) -> LeaseKeeper:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self) -> None:
        pause = self._ttl_s / 3
        while not self._stop.wait(pause):
            again = self.turn()
            if again is None:
                return
            pause = again

    def turn(self) -> float | None:
        """Renew once; return the seconds until the next renewal, or None if the lease is lost."""
        pause = RETRY_S
        try:
            if self.renew():
                self._fit()
                pause = self._ttl_s / 3
        except StoreUnavailable as error:
            log.warning("lease_not_fitted", lease=f"{self.lease:x}", remaining_s=self.remaining_s, error=str(error))
        except StoreError as error:
            self._lose(error)
            return None
        except (OSError, MemoryError) as error:
            log.warning("lease_not_renewed", lease=f"{self.lease:x}", remaining_s=self.remaining_s, error=str(error))
        return max(RETRY_S, min(pause, self.remaining_s)) if self._persistent else min(pause, self.remaining_s)

    def _lose(self, error: StoreError) -> None:
        self._lost = True
        if self._stop.is_set():
            return
        log.warning("lease_lost", lease=f"{self.lease:x}", error=str(error))
        if self.on_lost is not None:
            self.on_lost()
