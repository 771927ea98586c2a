"""The gRPC channels to etcd's endpoints. A channel keeps the certificates that it was made with: when a connection is
lost and their files have changed, all are made anew, so that rotated certificates need no restart.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import structlog

from membership.base.errors import ConfigError
from membership.store.credentials import Credentials
from membership.store.etcd3_compat import etcd3

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
Stamps = tuple[tuple[int, int, int], ...]  # of each file: what changes when it is written, or replaced

log = structlog.get_logger(__name__)


class Channels:
    """One client of etcd3 for each endpoint; from any thread."""

    def __init__(self, urls: Sequence[SplitResult], credentials: Credentials) -> None:
        self._urls, self._credentials = urls, credentials
        self._secure = urls[0].scheme == "https"
        self._lock = threading.Lock()
        self._closed = False
        self._stamps = self._files()
        self._clients = self._made()

    def __len__(self) -> int:
        return len(self._urls)

    def __getitem__(self, endpoint: int) -> Any:
        return self._clients[endpoint]

    def lost(self) -> None:
        """A connection is lost: the next one is made with the certificates that the files have by then."""
        with self._lock:
            if self._closed or not self._secure:
                return
            try:
                stamps = self._files()
                if stamps == self._stamps:
                    return
                self._credentials.tls()  # one of them may be half written, or not fit the other yet
                made = self._made()
            except (OSError, ConfigError) as error:
                log.warning("etcd_certificates_unusable", error=str(error))
                return
            old, self._clients, self._stamps = self._clients, made, stamps
        log.info("etcd_certificates_changed", ca=self._credentials.ca, cert=self._credentials.cert)
        for client in old:
            client.close()

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            self._closed = True
        for client in self._clients:
            client.close()

    def _files(self) -> Stamps:
        credentials = self._credentials
        found = [Path(each).stat() for each in (credentials.ca, credentials.cert, credentials.key) if each]
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)

    def _made(self) -> list[Any]:
        given = self._credentials
        certificates = {"ca_cert": given.ca, "cert_cert": given.cert or None, "cert_key": given.key or None}
        made = []
        for url in self._urls:
            # gRPC resolves a name anew for each connection
            host, _, port = f"dns:///{url.netloc}".rpartition(":") if url.netloc else ("unix", "", url.path)
            options = list(OPTIONS)
            made.append(etcd3.Etcd3Client(host, port, grpc_options=options, **(certificates if self._secure else {})))
        return made
