"""This host among others: the address at which they reach it, and the secret that all hosts of a cluster share."""

from __future__ import annotations

from dataclasses import dataclass, field

from membership.base.errors import ConfigError

SECRET_MIN_BYTES = 20
LAST_PORT = (1 << 16) - 1


@dataclass(frozen=True)
class Ports:
    """Where this host's processes may listen: `first` to `last`; 0: the kernel chooses."""

    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


ANY_PORT = Ports()


@dataclass(frozen=True)
class Network:
    """`address` is bound on this host, and other hosts connect to it. Who has the secret belongs to `cluster`."""

    address: str
    cluster: str
    secret: bytes = field(repr=False)
    ports: Ports = ANY_PORT

    def __post_init__(self) -> None:
        if len(self.secret) < SECRET_MIN_BYTES:
            raise ConfigError(
                f"the join secret has {len(self.secret)} bytes, and needs at least {SECRET_MIN_BYTES}",
                hint="write 32 random bytes as hexadecimal digits into --join-secret-file",
            )


def is_loopback(address: str) -> bool:
    """Whether only processes of the same host get there."""
    return address.startswith("127.") or address == "::1"


def is_ipv6(address: str) -> bool:
    """Whether it is an IPv6 address, with brackets or without; a name is none."""
    return ":" in address


def bracketed(address: str) -> str:
    """As it stands before a port."""
    return f"[{address}]" if is_ipv6(address) else address


def bare(address: str) -> str:
    """Without brackets, as sockets take it."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def ports_of(text: str) -> Ports:
    """The range that FIRST-LAST, or one port, means; nothing: any. ConfigError if it is none."""
    if not text:
        return ANY_PORT
    first, _, last = text.partition("-")
    if first.isdecimal() and (last or first).isdecimal() and 0 < int(first) <= int(last or first) <= LAST_PORT:
        return Ports(int(first), int(last or first))
    raise ConfigError(f"--port-range {text}: it is no range of ports", hint="give FIRST-LAST, such as 7000-7099")
