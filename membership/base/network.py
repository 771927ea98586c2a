"""This host among others: the address at which they reach it, and the secret that all hosts of a cluster share."""

from __future__ import annotations

from dataclasses import dataclass, field

from membership.base.errors import ConfigError

SECRET_MIN_BYTES = 20


@dataclass(frozen=True)
class Network:
    """`address` is bound on this host, and other hosts connect to it. Who has the secret belongs to `cluster`."""

    address: str
    cluster: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) < SECRET_MIN_BYTES:
            raise ConfigError(
                f"the join secret has {len(self.secret)} bytes, and needs at least {SECRET_MIN_BYTES}",
                hint="write 32 random bytes as hexadecimal digits into --join-secret-file",
            )


def is_loopback(address: str) -> bool:
    """Whether only processes of the same host get there."""
    return address.startswith("127.")
