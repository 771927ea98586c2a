"""The gRPC channels to etcd's endpoints. A channel keeps the certificates that it was made with: when it gave no answer
and their files have changed, a new one takes its place, so that rotated certificates need no restart. Not before etcd
accepts the new one: in the middle of a rotation it may know the old certificates only, and was just slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import grpc
import structlog

from membership.base.errors import ConfigError
from membership.store.credentials import Credentials
from membership.store.etcd3_compat import etcd3, etcdrpc

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 0),  # etcd answers pings without a stream with "too many pings"
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.lb_policy_name", "round_robin"),  # over the addresses of one name
    ("grpc.use_local_subchannel_pool", 1),  # separate connections per store object
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),  # a list of the whole prefix may exceed the default 4 MiB
)
ASK_S = 2.0  # that a new channel gets to be accepted: TLS takes several round trips
PAUSE_S = 5.0  # after a refusal: calls to an etcd that is away shall not each wait for a new channel, too
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
Stamps = tuple[tuple[int, int, int], ...]  # of each file: what changes when it is written, or replaced

log = structlog.get_logger(__name__)


class Channels:
    """One client of etcd3 for each endpoint; from any thread."""

    def __init__(self, urls: Sequence[SplitResult], credentials: Credentials) -> None:
        self._urls, self._credentials = urls, credentials
        self._secure = urls[0].scheme == "https"
        self._lock = threading.Lock()
        self._trying = threading.Lock()  # other certificates: one thread at a time
        self._closed = False
        self._stamps = [self._files()] * len(urls)  # of what each client was made with
        self._ask_at = [0.0] * len(urls)
        self._said = set[str]()  # warnings since certificates were changed
        self._clients = [self._made(url) for url in urls]

    def __len__(self) -> int:
        return len(self._urls)

    def __getitem__(self, endpoint: int) -> Any:
        return self._clients[endpoint]

    def unanswered(self, endpoint: int) -> None:
        """A call had no answer: use the certificates that the files have by now, if etcd accepts them there."""
        if not self._secure or not self._trying.acquire(blocking=False):
            return
        try:
            self._try_others(endpoint)
        finally:
            self._trying.release()

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
        for client in self._clients:
            client.close()

    def _try_others(self, endpoint: int) -> None:
        try:
            stamps = self._files()
            if stamps == self._stamps[endpoint] or time.monotonic() < self._ask_at[endpoint]:
                return
            self._credentials.tls()  # one of them may be half written, or not fit the other yet
            replaced = self._made(self._urls[endpoint])
        except (OSError, ConfigError) as error:
            self._say("etcd_certificates_unusable", str(error))
            return
        where = self._urls[endpoint].netloc
        if (refusal := _refusal(replaced)) is not None:
            self._ask_at[endpoint] = time.monotonic() + PAUSE_S
            self._say("etcd_certificates_not_accepted_yet", f"no connection to {where} with them: {refusal}")
        else:
            with self._lock:
                if not self._closed:
                    self._stamps[endpoint] = stamps
                    replaced, self._clients[endpoint] = self._clients[endpoint], replaced
            log.info("etcd_certificates_changed", etcd=where, ca=self._credentials.ca, cert=self._credentials.cert)
            self._said.clear()
        replaced.close()

    def _say(self, event: str, error: str) -> None:
        """Once: there may be many calls without an answer."""
        if error not in self._said:
            self._said.add(error)
            log.warning(event, error=error)

    def _files(self) -> Stamps:
        credentials = self._credentials
        found = [Path(each).stat() for each in (credentials.ca, credentials.cert, credentials.key) if each]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)

    def _made(self, url: SplitResult) -> Any:
        given = self._credentials
        certificates = {"ca_cert": given.ca, "cert_cert": given.cert or None, "cert_key": given.key or None}
        # gRPC resolves a name anew for each connection
        host, _, port = f"dns:///{url.netloc}".rpartition(":") if url.netloc else ("unix", "", url.path)
        return etcd3.Etcd3Client(host, port, grpc_options=list(OPTIONS), **(certificates if self._secure else {}))


def _refusal(client: Any) -> str | None:
    """Why etcd takes no connection of this client; None if it answers, whatever it says."""
    try:
        etcdrpc.MaintenanceStub(client.channel).Status(etcdrpc.StatusRequest(), timeout=ASK_S, wait_for_ready=True)
    except grpc.RpcError as error:
        return error.code().name.lower() if error.code() in NO_ANSWER else None
    return None
