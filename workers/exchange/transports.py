"""The transports by name. What one has to implement, and how to add one: `link.py`.

Each is imported when it is first opened, so that one does not need another's libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from membership.base.errors import ConfigError
from membership.base.network import Network
from workers.exchange.link import Transport
from workers.exchange.links import Links

Opener = Callable[[Links], Transport]
"""Makes one rank's transport. It adds its links to the `Links` given."""


def _shm(links: Links) -> Transport:
    from workers.exchange.shm.transport import ShmTransport

    return ShmTransport(links)


def _loopback(links: Links) -> Transport:
    from workers.exchange.loopback.transport import Loopback

    return Loopback(links)


_OPENERS: dict[str, Opener] = {"shm": _shm, "loopback": _loopback}


def between_hosts(network: Network | None) -> Opener:
    """What ranks run: shared memory on one host, and TCP to other hosts if there is a network."""
    from workers.exchange.auto import Auto

    return partial(Auto, network=network)


def register(name: str, opener: Opener) -> None:
    """Add a transport. ConfigError if the name is taken."""
    if name in _OPENERS:
        raise ConfigError(f"there is a transport {name!r} already")
    _OPENERS[name] = opener


def opener(name: str) -> Opener:
    """The transport of this name, for `Exchange`. ConfigError if there is none."""
    if name not in _OPENERS:
        raise ConfigError(f"unknown transport {name!r}", hint=f"use one of {', '.join(sorted(_OPENERS))}")
    return _OPENERS[name]
