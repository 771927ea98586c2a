"""One request to a server over the network as it is: how long it takes, or how it fails.

Injectors of network faults probe before and after: a fault that a probe does not show did not happen.
"""

from __future__ import annotations

import http.client
import socket
import time
from urllib.parse import urlsplit

import msgspec

PROBE_TIMEOUT_S = 1.0
CUT_SHORT = "IncompleteHeaders"  # http.client takes the end of the stream for the end of the headers


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one probe."""

    seconds: float
    size: int = 0  # bytes of the answer
    error: str = ""  # the exception's name; "" if it was answered

    def __str__(self) -> str:
        return f"{self.error} after {self.seconds * 1000:.0f} ms" if self.error else f"{self.seconds * 1000:.1f} ms"


def ask(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
    """GET over a connection of its own; any status is an answer."""
    parts = urlsplit(url)
    began = time.monotonic()
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        answer = connection.getresponse()
        whole = answer.chunked or answer.length is not None
        size = len(answer.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(seconds=time.monotonic() - began, error=type(error).__name__)
    finally:
        connection.close()
    return Answer(seconds=time.monotonic() - began, size=size, error="" if whole else CUT_SHORT)


def reach(host: str, port: int, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
    """Open a TCP connection."""
    began = time.monotonic()
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        return Answer(seconds=time.monotonic() - began, error=type(error).__name__)
    return Answer(seconds=time.monotonic() - began)
