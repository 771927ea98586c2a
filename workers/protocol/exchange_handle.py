"""Where peers reach a rank's exchange, as it stands in the rank's record. Light: to look for it takes no tensors."""

from __future__ import annotations

import msgspec


class AutoHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where peers reach a rank: those of its host, and those of other hosts (empty: they cannot)."""

    host: str
    shm: bytes
    tcp: bytes = b""


class TcpHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where peers on other hosts reach a rank's exchange."""

    address: str
    key: bytes  # CURVE public key of what listens there


def far_endpoint(handle: bytes) -> tuple[str, str]:
    """Its host, and its endpoint for other hosts; empty if there is none, or the transport has handles of its own."""
    try:
        found = msgspec.msgpack.decode(handle, type=AutoHandle)
        return found.host, msgspec.msgpack.decode(found.tcp, type=TcpHandle).address if found.tcp else ""
    except msgspec.MsgspecError:
        return "", ""
