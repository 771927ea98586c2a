"""Whether something listens at an address of the network."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def accepts(endpoint: str, timeout_s: float) -> bool:
    """Whether a connection to tcp://HOST:PORT is accepted within this time."""
    where = urlsplit(endpoint)
    try:
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=timeout_s):
            return True
    except OSError:
        return False
