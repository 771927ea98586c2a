"""The store on a real etcd, through etcd3's channel and stubs. Its watcher and locks are not used: see etcd_watch.py.

Reads are retried within their deadline. Writes are sent once: if there is no answer, the outcome is *unknown*, and the
caller must read back. The channel's keepalive detects a server that is stopped or unreachable. After a lost
connection the first call is a read, so that a replaced store is refused before anything is written to it. Nothing is
returned before etcd has it on disk: see durability.py.

Of several endpoints one is used until it does not answer, then the next: a member that is cut off from its peers costs
one call, not every third.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import SplitResult

import grpc
from tenacity import (
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from membership.base.attempts import is_shortage
from membership.base.errors import LeaseLost, StoreDenied, StoreError, StoreUnavailable
from membership.base.timing import STORE_CALL_TIMEOUT_S, STORE_CONNECT_TIMEOUT_S
from membership.store.credentials import NO_CREDENTIALS, Credentials
from membership.store.durability import acknowledges_early
from membership.store.endpoints import parsed
from membership.store.etcd3_compat import etcdrpc
from membership.store.etcd_channels import Channels
from membership.store.etcd_session import Session, tls_refusal
from membership.store.etcd_watch import EtcdWatch, Metadata, key_value, translated
from membership.store.interface import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Response,
    TxnResult,
    key_bytes,
    prefix_end,
)
from membership.store.pace import Pace
from membership.store.provenance import Provenance

LEAST_S = 0.05  # that an attempt is given
FIRST_PROBE_S = 1.0  # then it is asked whether certificates are to blame
_OPERATORS = {"=": "EQUAL", "!=": "NOT_EQUAL", "<": "LESS", ">": "GREATER"}


def connect(
    endpoints: Sequence[str],
    credentials: Credentials = NO_CREDENTIALS,
    *,
    prefix: str = "",
    timeout_s: float = STORE_CALL_TIMEOUT_S,
    connect_timeout_s: float = STORE_CONNECT_TIMEOUT_S,
    seen: str = "",
) -> EtcdStore:
    """Connect to etcd and check that it answers. An endpoint is `http://`, `https://` or, for a socket, `unix:///PATH`.

    `prefix`: of the keys that are read and written; a user may have no right to others. `seen`: another process's
    `EtcdStore.seen`; StoreReplaced if this is another store. ConfigError: bad endpoints or certificates. StoreDenied:
    a user whom it does not accept. StoreUnavailable: no answer.
    """
    urls = parsed(endpoints)
    secure = urls[0].scheme == "https"
    credentials.check(secure=secure)
    where = ",".join(f"{url.scheme}://{url.netloc}{url.path}" for url in urls)
    channels, session = Channels(urls, credentials), Session(credentials, where)
    store = EtcdStore(channels, where, timeout_s, Provenance(seen), session, prefix)
    with ExitStack() as undo:
        undo.callback(store.close)
        if secure:
            _require_tls(store, urls, credentials, connect_timeout_s)
        store.probe(connect_timeout_s)
        store.learn_version(connect_timeout_s)
        undo.pop_all()
    return store


def _require_tls(store: EtcdStore, urls: Sequence[SplitResult], credentials: Credentials, timeout_s: float) -> None:
    """ConfigError if certificates are not accepted: gRPC would try again until the end, and not say why."""
    try:
        store.probe(min(timeout_s, FIRST_PROBE_S))
    except StoreDenied:
        raise
    except StoreUnavailable:
        for url in urls:
            if refusal := tls_refusal(url.hostname or "", url.port or 0, credentials):
                raise refusal from None


class _Renewals(NamedTuple):
    """The answers of one stream, in the order asked."""

    header: Any  # of the last one
    each: tuple[Any, ...]


class EtcdStore:
    """See Store. Made by `connect`."""

    def __init__(
        self,
        channels: Channels,
        where: str,
        timeout_s: float,
        provenance: Provenance,
        session: Session,
        prefix: str,
    ) -> None:
        self._channels = channels
        self._session = session
        self._nothing = Get(prefix + "\0")  # a key that does not exist
        self._acknowledges_early = True  # until its version is known
        self._turn = random.randrange(len(channels))  # so that clients use different members
        self._provenance = provenance
        self._pace = Pace()
        self._where = where
        self._timeout_s = timeout_s
        self._closed = threading.Event()
        self._watches: dict[EtcdWatch, int] = {}  # -> index of its endpoint

    @property
    def seen(self) -> str:
        return self._provenance.seen

    @property
    def pace_s(self) -> float:
        return self._pace.seconds

    def probe(self, timeout_s: float) -> None:
        """Read a key that does not exist; StoreUnavailable if there is no answer."""
        self._read(self._nothing, timeout_s)

    def learn_version(self, timeout_s: float) -> None:
        """Ask for etcd's version, which says whether answers must be confirmed. They are until it is known."""
        request = etcdrpc.StatusRequest()
        try:
            answer = self._attempt(_status, request, "ask for its version", timeout_s, self._turn)
        except StoreError:  # it has answered before: a moment's outage, or it has no such call, or not for us
            return
        self._acknowledges_early = acknowledges_early(answer.version)

    def get(self, key: str) -> KeyValue | None:
        found = self._read(Get(key), self._timeout_s)
        return key_value(found.kvs[0]) if found.kvs else None

    def range(self, prefix: str) -> tuple[int, tuple[KeyValue, ...]]:
        found = self._read(Get(prefix, prefix=True), self._timeout_s)
        return found.header.revision, tuple(key_value(kv) for kv in found.kvs)

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        request = etcdrpc.PutRequest(key=key_bytes(key), value=value, lease=lease)
        return int(self._call(lambda etcd: etcd.kvstub.Put, request, f"put {key}").header.revision)

    def delete(self, key: str) -> bool:
        request = etcdrpc.DeleteRangeRequest(key=key_bytes(key))
        return bool(self._call(lambda etcd: etcd.kvstub.DeleteRange, request, f"delete {key}").deleted)

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        request = etcdrpc.TxnRequest(
            compare=[_compare(compare) for compare in compares],
            success=[_operation(op) for op in success],
            failure=[_operation(op) for op in failure],
        )
        done = self._call(lambda etcd: etcd.kvstub.Txn, request, f"txn on {_subject(compares, success)}")
        revision = int(done.header.revision)
        return TxnResult(done.succeeded, revision, tuple(_response(response, revision) for response in done.responses))

    def grant(self, ttl_s: float) -> int:
        request = etcdrpc.LeaseGrantRequest(TTL=max(1, math.ceil(ttl_s)))
        return int(self._call(lambda etcd: etcd.leasestub.LeaseGrant, request, "grant a lease", ordered=False).ID)

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        renewed = self.keepalives([lease], timeout_s)
        if not renewed:
            raise LeaseLost(f"lease {lease:x} has ended")
        return renewed[lease]

    def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
        """See Store. One stream, however many leases; one per renewal: there is nothing to reopen after an outage."""
        if not leases:
            return {}
        answers = self._call(
            lambda etcd: partial(self._renew, etcd),
            tuple(leases),
            f"renew lease {leases[0]:x}" + (f" and {len(leases) - 1} more" if len(leases) > 1 else ""),
            timeout_s,
            ordered=False,
            confirmed=False,
        )
        return {answer.ID: float(answer.TTL) for answer in answers.each if answer.TTL > 0}

    def lifetime_s(self, lease: int) -> float:
        """See Store."""
        request = etcdrpc.LeaseTimeToLiveRequest(ID=lease)
        try:
            found = self._call(
                lambda etcd: etcd.leasestub.LeaseTimeToLive, request, f"read lease {lease:x}", ordered=False
            )
        except LeaseLost:
            return 0.0
        return float(found.grantedTTL)

    def revoke(self, lease: int) -> None:
        request = etcdrpc.LeaseRevokeRequest(ID=lease)
        try:
            self._call(lambda etcd: etcd.leasestub.LeaseRevoke, request, f"revoke lease {lease:x}", ordered=False)
        except LeaseLost:
            return  # it has ended already

    def watch(self, prefix: str, start_revision: int) -> EtcdWatch:
        if self._closed.is_set():
            raise StoreUnavailable(f"the connection to etcd at {self._where} is closed")
        self._probe_if_doubtful(self._timeout_s)
        turn = self._turn
        try:
            watch = self._begin_watch(self._channels[turn], prefix, start_revision)
        except StoreDenied as error:
            if not self._session.forgotten(error):
                raise
            watch = self._begin_watch(self._channels[turn], prefix, start_revision)
        self._watches = {old: endpoint for old, endpoint in self._watches.items() if not old.closed} | {watch: turn}
        return watch

    def compact(self, revision: int) -> None:
        request = etcdrpc.CompactionRequest(revision=revision, physical=True)
        self._call(lambda etcd: etcd.kvstub.Compact, request, f"compact at {revision}", ordered=False)

    def close(self) -> None:
        self._closed.set()
        for watch in self._watches:
            watch.close()
        self._channels.close()

    def _begin_watch(self, client: Any, prefix: str, start_revision: int) -> EtcdWatch:
        stub, metadata = etcdrpc.WatchStub(client.channel), self._session.metadata(client, self._timeout_s)
        where, provenance = self._where, self._provenance
        try:
            return EtcdWatch(
                (stub, metadata), prefix, start_revision, self._timeout_s, where, provenance, self._confirm
            )
        except Exception as error:
            raise self._without_resources(error, f"watch of {prefix}") from error

    def _next_endpoint(self, turn: int) -> None:
        """Use the next endpoint, unless another thread has switched already; break watches of the old one."""
        if self._turn == turn and len(self._channels) > 1:
            self._turn = (turn + 1) % len(self._channels)
            for watch, endpoint in list(self._watches.items()):  # otherwise its silence would look like no changes
                if endpoint == turn:
                    watch.break_off()

    def _renew(self, client: Any, leases: Sequence[int], timeout: float, metadata: Metadata) -> _Renewals:
        requests = (etcdrpc.LeaseKeepAliveRequest(ID=lease) for lease in leases)
        call = client.leasestub.LeaseKeepAlive(requests, timeout=timeout, metadata=metadata)
        try:
            answers = tuple(islice(call, len(leases)))
        finally:
            call.cancel()
        if len(answers) < len(leases):
            raise StoreUnavailable(f"etcd at {self._where} answered {len(answers)} of {len(leases)} renewals")
        return _Renewals(answers[-1].header, answers)

    def _read(self, op: Get, timeout_s: float) -> Any:
        """Read with retries within `timeout_s`. An attempt takes at most half of it: then another member."""
        deadline = time.monotonic() + timeout_s
        request = _range_request(op)

        def attempt() -> Any:
            left = max(LEAST_S, min(timeout_s / 2, deadline - time.monotonic()))
            what = f"read {op.key.removesuffix(chr(0)) or 'anything'}"
            return self._call(_range, request, what, left, reads=True)

        return Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, StoreUnavailable) and not isinstance(e, StoreDenied)),
            stop=stop_after_delay(timeout_s) | stop_when_event_set(self._closed),
            wait=wait_random_exponential(multiplier=0.02, max=0.3),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )(attempt)

    def _probe_if_doubtful(self, timeout_s: float) -> None:
        """Before a write: check once after each lost connection that this is still the store that we know."""
        self._provenance.floor()
        if self._provenance.doubtful:
            self.probe(timeout_s)

    def _call(
        self,
        method: Callable[[Any], Any],
        request: Any,
        what: str,
        timeout_s: float | None = None,
        *,
        ordered: bool = True,
        reads: bool = False,
        confirmed: bool = True,
    ) -> Any:
        """Make one call.

        `ordered`: the answer's revision is linearizable, not that of a member that may lag. `confirmed`: return once
        what the answer shows is on disk.
        """
        timeout_s = timeout_s or self._timeout_s
        if not reads:
            self._probe_if_doubtful(timeout_s)
        floor, deadline = self._provenance.floor(), time.monotonic() + timeout_s
        answer = self._attempt(method, request, what, timeout_s, self._turn)
        if confirmed:
            self._confirm(what, max(LEAST_S, deadline - time.monotonic()))
        header = answer.header
        revision, floor = (header.revision, floor) if ordered else (0, 0)
        self._provenance.observed(header.cluster_id, revision, floor, settled=reads)
        return answer

    def _confirm(self, what: str, timeout_s: float | None = None) -> None:
        """Return once all that etcd has shown so far is on disk. StoreUnavailable: it may be, or not."""
        if self._acknowledges_early:
            request = _range_request(self._nothing)
            self._attempt(_range, request, f"confirm {what}", timeout_s or self._timeout_s, self._turn)

    def _attempt(self, method: Callable[[Any], Any], request: Any, what: str, timeout_s: float, turn: int) -> Any:
        """Send it to one endpoint, and return its answer; a StoreError if there is none."""
        if self._closed.is_set():
            raise StoreUnavailable(f"the connection to etcd at {self._where} is closed")
        begun = time.monotonic()
        try:
            answer = self._send(method, self._channels[turn], request, timeout_s)
            self._pace.note(time.monotonic() - begun)
            return answer
        except grpc.RpcError as error:
            ours = translated(error, what, self._where)
            self._note(ours, turn)
            raise ours from error
        except StoreUnavailable as error:  # so soon: it was asked for a token first
            self._note(error, turn)
            raise
        except ValueError as error:  # raised by gRPC if the channel was closed meanwhile
            raise StoreUnavailable(f"etcd at {self._where}: {what}: {error}") from error
        except Exception as error:
            raise self._without_resources(error, what) from error

    def _note(self, error: Exception, turn: int) -> None:
        """Where there was no answer, the next call may be to another store, with other certificates, elsewhere."""
        if isinstance(error, StoreUnavailable) and not error.definite:
            self._provenance.doubt()
            self._channels.unanswered(turn)
            self._next_endpoint(turn)

    def _without_resources(self, error: Exception, what: str) -> Exception:
        """What this process lacked (a thread, memory, a descriptor) is an outage of the store to its callers."""
        if not is_shortage(error):
            return error
        self._provenance.doubt()
        return StoreUnavailable(f"etcd at {self._where} cannot be asked: {what}: {error or type(error).__name__}")

    def _send(self, method: Callable[[Any], Any], client: Any, request: Any, timeout_s: float) -> Any:
        """Send it, and once more with a new token if etcd has forgotten ours."""
        metadata = self._session.metadata(client, timeout_s)
        try:
            return method(client)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            if not self._session.forgotten(error):
                raise
        return method(client)(request, timeout=timeout_s, metadata=self._session.metadata(client, timeout_s))


def _range(client: Any) -> Any:
    return client.kvstub.Range


def _status(client: Any) -> Any:
    return etcdrpc.MaintenanceStub(client.channel).Status


def _range_request(op: Get) -> Any:
    key = key_bytes(op.key)
    return etcdrpc.RangeRequest(key=key or b"\0", range_end=prefix_end(key) if op.prefix else b"")


def _compare(compare: Compare) -> Any:
    revision = compare.target in ("create", "mod")
    return etcdrpc.Compare(
        key=key_bytes(compare.key),
        result=etcdrpc.Compare.CompareResult.Value(_OPERATORS[compare.op]),
        target=etcdrpc.Compare.CompareTarget.Value(compare.target.upper()),
        **{f"{compare.target}_revision" if revision else compare.target: compare.value},
    )


def _operation(op: Op) -> Any:
    key = key_bytes(op.key)
    if isinstance(op, Put):
        return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=op.value, lease=op.lease))
    if isinstance(op, Delete):
        end = prefix_end(key) if op.prefix else b""
        return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key or b"\0", range_end=end))
    return etcdrpc.RequestOp(request_range=_range_request(op))


def _response(response: Any, revision: int) -> Response:
    kind = response.WhichOneof("response")
    if kind == "response_range":
        return tuple(key_value(kv) for kv in response.response_range.kvs)
    return int(response.response_delete_range.deleted) if kind == "response_delete_range" else revision


def _subject(compares: Sequence[Compare], ops: Sequence[Op]) -> str:
    return ", ".join(dict.fromkeys(part.key for part in (*ops, *compares))) or "nothing"
