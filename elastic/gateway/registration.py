"""A gateway's record in the store, so that others find it. The gateway serves requests even without the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from msgspec.structs import replace

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
    """Keeps the record under a lease, from a thread; registers again whenever the lease was lost.

    `join_keys` is asked again and again: the gateway's host may get another join secret.
    """

    def __init__(
        self,
        store: Store,
        cluster: str,
        record: GatewayRecord,
        ttl_s: float,
        join_keys: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._store, self._join_keys = store, join_keys
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
        keeper.carry = lambda lease: None  # what is written again below
        written: tuple[GatewayRecord, int] | None = None
        while not (self._stop.is_set() or self._wake.is_set()):
            wanted = (replace(self._record, join_keys=self._join_keys()), keeper.lease)
            if wanted != written:
                self._store.put(self._key, codec.encode(wanted[0]), wanted[1])
                written = wanted
            self._wake.wait(RETRY_S)
