"""Writes the engine's status to the store, in a thread of its own: a slow or unavailable store delays no step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog
from msgspec.structs import replace

from membership.base import failpoints
from membership.base.attempts import Attempts
from membership.base.errors import LeaseLost, StoreError, WaitTimeout
from membership.store.codec import encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys
from membership.store.ordered import OrderedKey
from membership.store.records import EngineStatus, ExpertLoad

PERIOD_S = 1.0
RETRY_S = 0.1

log = structlog.get_logger(__name__)


class StatusWriter:
    """Writes the latest status every second, and at once when an urgent field changes. Fenced by the engine token."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        token: int,
        lease: Callable[[], int],
        on_fenced: Callable[[], None],
        join_keys: Callable[[], tuple[str, ...]] = tuple,
        *,
        background: bool = True,
    ) -> None:
        self._key, self._loads_key = OrderedKey(store, keys.engine_status), keys.expert_load
        self._fence = Compare(keys.engine, "create", "=", token)
        self._lease = lease
        self._on_fenced = on_fenced
        self._join_keys = join_keys
        self._changed = threading.Condition()
        self._status = EngineStatus(token=token, epoch=0)
        self._loads: ExpertLoad | None = None
        self._loads_written: tuple[ExpertLoad | None, int] = None, 0  # and under which lease
        self._urgent = True
        self._stop = False
        self._reachable = True
        self._attempts = Attempts("engine status")
        self.fenced = False  # another engine is elected, or may be
        self._thread = threading.Thread(target=self._run, name="engine-status", daemon=True)
        if background:
            self._thread.start()

    def update(self, status: EngineStatus) -> None:
        """Take over the latest status; cheap, never blocks on the store."""
        with self._changed:
            before, self._status = self._status, status
            if _urgent(before) != _urgent(status):
                self._urgent = True
                self._changed.notify_all()

    def rewrite(self) -> None:
        """Write all of it once more, at once: we have another lease, and the one that it is under ends."""
        with self._changed:
            self._urgent = True
            self._changed.notify_all()

    def publish_loads(self, loads: ExpertLoad) -> None:
        """Write the experts' loads with the next status."""
        with self._changed:
            self._loads = loads

    def close(self) -> None:
        """Stop writing."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=15.0)
        if self._thread.is_alive():
            raise WaitTimeout("the engine's status writer did not stop within 15 s")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._stop, timeout=PERIOD_S)
                if self._stop:
                    return
            if not self._attempts.run(self.turn):
                with self._changed:
                    self._urgent = True
                    self._changed.wait_for(lambda: self._stop, timeout=RETRY_S)
            if self.fenced:
                return

    @property
    def urgent(self) -> bool:
        """Whether there is something unwritten that other processes act on."""
        return self._urgent

    def turn(self) -> bool:
        """Write the latest status; False once this engine is fenced."""
        with self._changed:
            self._urgent, status, loads = False, self._status, self._loads
        if not self._write(status, loads):
            self.fenced = True
            self._on_fenced()
        return not self.fenced

    def _write(self, status: EngineStatus, loads: ExpertLoad | None) -> bool:
        """False if this engine has been replaced, or its lease has ended, which lets others replace it."""
        lease = self._lease()
        there = (loads, lease) == self._loads_written
        more = [] if loads is None or there else [Put(self._loads_key, encode(loads), lease)]
        value = encode(replace(status, join_keys=self._join_keys()))
        failpoints.hit("engine.before.status")
        try:
            in_office = self._key.put(value, lease, [self._fence], more)
        except LeaseLost:
            if self._lease() == lease:
                return False
            self.rewrite()  # the office went over to another lease while this was on its way
            return True
        except StoreError as error:
            if self._reachable:
                log.warning("engine_status_not_written", error=str(error))
            self._reachable = False
            return True
        self._reachable = True
        if in_office:
            self._loads_written = loads, lease
        return in_office


def _urgent(status: EngineStatus) -> tuple[object, ...]:
    """The fields that other processes act on."""
    return (
        status.epoch, status.masked, status.uncovered, status.vacated_revision, status.reading, status.recovering,
    )  # fmt: skip
