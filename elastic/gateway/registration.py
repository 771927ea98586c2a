"""A gateway's record in the store, so that others find it. The gateway serves requests even without the store."""

from __future__ import annotations

import threading
from types import TracebackType

from membership.base.attempts import Attempts
from membership.base.errors import StoreError, WaitTimeout
from membership.store import codec
from membership.store.interface import Store
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.records import GatewayRecord

RETRY_S = 1.0
CLOSE_TIMEOUT_S = 15.0


class Registration:
    """Keeps the record under a lease, from a thread; registers again whenever the lease was lost."""

    def __init__(self, store: Store, cluster: str, record: GatewayRecord, ttl_s: float) -> None:
        self._store = store
        self._key = Keys(cluster).gateway(record.name)
        self._record = record
        self._ttl_s = ttl_s
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._attempts = Attempts("registration", also=(StoreError,))
        self._thread = threading.Thread(target=self._run, name=f"registration-{record.name}", daemon=True)

    def __enter__(self) -> Registration:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout(f"registration of gateway {self._record.name} did not end in {CLOSE_TIMEOUT_S:g} s")

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._attempts.run(self._register):
                self._stop.wait(self._attempts.wait_s())

    def _register(self) -> None:
        self._wake.clear()
        with LeaseKeeper(self._store, self._ttl_s, on_lost=self._wake.set, persistent=True) as keeper:
            self._hold(keeper)

    def _hold(self, keeper: LeaseKeeper) -> None:
        self._store.put(self._key, codec.encode(self._record), keeper.lease)
        while not (self._stop.is_set() or self._wake.is_set()):
            self._wake.wait(RETRY_S)
