"""Where etcd is: its endpoints' URLs, and whether anything listens there. It is asked before gRPC is imported.

Who has yet to start processes, or is a person at a terminal, need not wait for what is not there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import SplitResult, unquote, urlsplit

from membership.base.errors import ConfigError, StoreUnavailable
from membership.base.timing import STORE_LISTENS_S

PAUSE_S = 0.05


def require_listener(endpoints: Sequence[str], timeout_s: float = STORE_LISTENS_S) -> None:
    """StoreUnavailable if nothing comes to listen at any of these endpoints. A socket is our own etcd's: left out."""
    urls = [url for url in parsed(endpoints) if url.scheme != "unix"]
    deadline = time.monotonic() + timeout_s
    while urls:
        refusals = []
        for number, url in enumerate(urls):
            left_s = max(deadline - time.monotonic(), PAUSE_S) / (len(urls) - number)
            try:
                socket.create_connection((url.hostname or "", url.port or 0), timeout=left_s).close()
            except OSError as error:
                refusals.append(f"etcd at {url.scheme}://{url.netloc} cannot be reached: {error.strerror or error}")
            else:
                return
        if time.monotonic() >= deadline:
            raise StoreUnavailable("; ".join(refusals), hint="is it running, and is that its address?")
        time.sleep(PAUSE_S)


def parsed(endpoints: Sequence[str]) -> list[SplitResult]:
    """The endpoints' URLs, all of one kind. ConfigError for anything else."""
    try:
        urls = [urlsplit(e if "://" in e else f"http://{e}") for e in endpoints]
    except ValueError as error:
        raise ConfigError(f"bad etcd endpoint: {error}", hint="give URLs such as http://127.0.0.1:2379") from None
    for url in urls:
        if url.username is not None:
            raise ConfigError("an etcd endpoint holds a user's name", hint="give --etcd-user and --etcd-password-file")
        try:
            good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 0) > 0
        except ValueError:
            good = False
        if url.scheme == "unix":  # gRPC takes a comma for the end of the path
            _require_right(unquote(url.path))
            good = not url.netloc and url.path.startswith("/") and "," not in unquote(url.path)
        if not good:
            hint = "give URLs such as http://127.0.0.1:2379, or unix:///PATH"
            raise ConfigError(f"bad etcd endpoint {url.geturl()!r}", hint=hint)
    if not urls or len({url.scheme for url in urls}) > 1:
        raise ConfigError("give one or more etcd endpoints, all http, all https or all unix")
    return urls


def _require_right(path: str) -> None:
    """ConfigError if we may not connect to it: gRPC would try again until the end. One that is missing may come yet."""
    with suppress(OSError):
        try:
            os.stat(path)
            allowed = os.access(path, os.W_OK)
        except PermissionError:
            allowed = False
        if not allowed:
            hint = "run this as the user who serves the cluster"
            raise ConfigError(f"user {os.geteuid()} may not connect to etcd at {path}", hint=hint)
