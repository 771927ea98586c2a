"""A watch on etcd over its own stream, read by its own thread; and the translation of etcd's errors and records.

etcd3's watcher is not used: it spins and drops its watches while the server is down. This one ends with an error that
says why, and its owner (Mirror) starts another from the revision that it has reached.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from membership.base.errors import (
    LeaseLost,
    StoreCompacted,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreReplaced,
    StoreUnavailable,
)
from membership.store.etcd3_compat import etcdrpc
from membership.store.interface import KeyValue, WatchBatch, WatchEvent, key_bytes, key_text, prefix_end
from membership.store.provenance import Provenance

Metadata = tuple[tuple[str, str], ...]  # what goes with a call
HAS_LEADER = (("hasleader", "true"),)  # etcd ends the stream of a member that has lost its quorum
JOIN_TIMEOUT_S = 5.0
FULL_HINT = (
    "etcd is out of room: compact and defragment it, or raise --quota-backend-bytes; then `etcdctl alarm disarm`. "
    "Until then membership is frozen, and serving goes on"
)
AUTH_OFF = "etcdserver: authentication is not enabled"
DENIED = "etcdserver: permission denied"
LOGIN_FAILED = "etcdserver: authentication failed, invalid user ID or password"
FORGOTTEN = (  # what etcd says when our token is not valid any more
    "etcdserver: invalid auth token",
    "etcdserver: revision of auth store is old",
    "etcdserver: user name is empty",
)
_DELETE = 1  # etcd's event type
_UNKNOWN_OUTCOME = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)


def translated(error: grpc.RpcError, what: str, where: str) -> StoreError:
    """Return our error for gRPC's."""
    code, details = error.code(), error.details() or ""
    message = f"etcd at {where}: {what}: {details or code.name.lower()}"
    if code in _UNKNOWN_OUTCOME:
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"etcd at {where} did not answer in time: {what}"
        return StoreUnavailable(message, hint="check that etcd runs and can be reached there")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith("etcdserver: "):  # not gRPC's own limits
        return StoreFull(message, hint=FULL_HINT if "space" in details else "")
    if hint := denial_hint(details):
        return StoreDenied(message, hint=hint)
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseLost(message)
    if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return StoreCompacted(message)
    return StoreError(message)


def denial_hint(reason: str) -> str:
    """What to do about a refusal that etcd gives this reason for; empty if it is not about who we are."""
    if reason == DENIED:
        return "grant our etcd user readwrite on the cluster's keys: etcdctl role grant-permission --prefix=true"
    if reason == LOGIN_FAILED:
        return "check --etcd-user, and the password in the file of --etcd-password-file"
    return "etcd asks for a user: --etcd-user and --etcd-password-file" if reason in FORGOTTEN else ""


def key_value(kv: Any) -> KeyValue:
    """Return our KeyValue for etcd's."""
    return KeyValue(
        key=key_text(kv.key),
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        version=kv.version,
        lease=kv.lease,
    )


class EtcdWatch:
    """See Watch. The constructor returns once the server has confirmed the watch."""

    def __init__(
        self,
        calls: tuple[Any, Metadata],
        prefix: str,
        start_revision: int,
        timeout_s: float,
        where: str,
        provenance: Provenance,
        confirm: Callable[[str], None],
    ) -> None:
        """`calls`: the watch stub, and what goes with its calls. `confirm` returns once what was shown is on disk."""
        self._confirm_on_disk = confirm
        self._provenance = provenance
        self._prefix = prefix
        self._start_revision = start_revision
        self._where = where
        self._inbox: queue.SimpleQueue[WatchBatch | StoreError | None] = queue.SimpleQueue()
        self._end: StoreError | None = None
        self._closed = threading.Event()
        stub, metadata = calls
        self._call = stub.Watch(self._requests(), metadata=HAS_LEADER + metadata)
        self._thread = threading.Thread(target=self._read, name=f"etcd-watch-{prefix}", daemon=True)
        try:
            self._thread.start()
            self._confirm(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def next(self, timeout_s: float) -> WatchBatch | None:
        if self._end is not None:
            raise self._end
        try:
            item = self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if isinstance(item, StoreError):
            self._end = item
            raise item
        return item

    def break_off(self) -> None:
        """End the stream as if it had broken."""
        self._call.cancel()

    def close(self) -> None:
        self._closed.set()
        self._call.cancel()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(JOIN_TIMEOUT_S)

    def _confirm(self, timeout_s: float) -> None:
        try:
            first = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise StoreUnavailable(
                f"etcd at {self._where} did not confirm a watch of {self._prefix} within {timeout_s:g} s"
            ) from None
        if isinstance(first, StoreError):
            raise first

    def _requests(self) -> Iterator[Any]:
        key = key_bytes(self._prefix)
        yield etcdrpc.WatchRequest(
            create_request=etcdrpc.WatchCreateRequest(
                key=key or b"\0", range_end=prefix_end(key), start_revision=self._start_revision
            )
        )
        while not self._closed.wait(60.0):  # the stream lasts as long as this iterator
            continue

    def _read(self) -> None:
        """Read until the stream ends. The first item is None: the server's confirmation."""
        what = f"watch of {self._prefix}"
        try:
            for response in self._call:
                if response.events and response.events[-1].kv.mod_revision > self._provenance.revision:
                    self._confirm_on_disk(f"the {what}")
                item = self._decoded(response)
                if item is not None or response.created:
                    self._inbox.put(item)
                if isinstance(item, StoreError):
                    return
        except grpc.RpcError as error:
            if not self._closed.is_set():
                self._provenance.doubt()
            self._inbox.put(translated(error, what, self._where))
        except StoreError as error:
            self._inbox.put(error)
        except (OSError, MemoryError) as error:
            self._provenance.doubt()
            self._inbox.put(StoreUnavailable(f"etcd at {self._where}: {what}: {error or type(error).__name__}"))
        finally:
            self._inbox.put(StoreUnavailable(f"etcd at {self._where} ended the {what}"))

    def _decoded(self, response: Any) -> WatchBatch | StoreError | None:
        what = f"watch of {self._prefix} from revision {self._start_revision}"
        try:  # watched events are committed: no later answer may have a lower revision
            last = response.events[-1].kv.mod_revision if response.events else 0
            self._provenance.observed(response.header.cluster_id, last)
        except StoreReplaced as replaced:
            return replaced
        if response.compact_revision:
            return StoreCompacted(f"{what}: compacted at {response.compact_revision}")
        if response.canceled:
            reason = response.cancel_reason.rpartition("desc = ")[2]  # some are whole gRPC errors in words
            if hint := denial_hint(reason):
                return StoreDenied(f"etcd at {self._where}: {what}: {reason}", hint=hint)
            return StoreUnavailable(f"etcd at {self._where} cancelled the {what}: {reason}")
        if response.created and self._start_revision > response.header.revision + 1:
            return StoreCompacted(f"{what}: the store's history ends at {response.header.revision}")
        if not response.events:
            return None
        events = tuple(
            WatchEvent("delete" if event.type == _DELETE else "put", key_value(event.kv)) for event in response.events
        )
        return WatchBatch(events[-1].kv.mod_revision, events)
