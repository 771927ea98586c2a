"""The keys of connections between hosts: all hosts of a cluster derive them from its join secret.

Nothing secret is in a record. For each purpose one pair of keys is for the side that listens, one for the side that
connects; each side knows the other's public half by itself, so a record that names another one is refused.
"""

from __future__ import annotations

import hmac
from enum import StrEnum
from urllib.parse import urlsplit

from membership.base.errors import ConfigError, QueueError
from membership.base.network import Network, is_loopback
from membership.store.records import ClusterConfig, ClusterState
from workers.queue.handle import CurveKeys, Handle, Remote, this_host


class Purpose(StrEnum):
    """What keys are for: those of one purpose open no connection of another."""

    RANKS = ""  # steps, answers and rows
    GATEWAYS = "gateways "


def listening_keys(network: Network, purpose: Purpose = Purpose.RANKS) -> CurveKeys:
    """The keys of the side that is connected to."""
    return _derived(network, f"{purpose}listening")


def connecting_keys(network: Network, purpose: Purpose = Purpose.RANKS) -> CurveKeys:
    """The keys of the side that connects."""
    return _derived(network, f"{purpose}connecting")


def remote_of(network: Network) -> Remote:
    """How a queue serves readers on other hosts."""
    return Remote(network.address, listening_keys(network), frozenset({connecting_keys(network).public}), network.ports)


def keys_for(handle: Handle, network: Network | None) -> CurveKeys | None:
    """What joining this queue needs; None where its writer is on this host, or does not serve others.

    QueueError if its writer has another join secret.
    """
    if network is None or not handle.remote or handle.host == this_host():
        return None
    require_same_secret(handle.remote_key, network)
    return connecting_keys(network)


def require_same_secret(listener: bytes, network: Network, purpose: Purpose = Purpose.RANKS) -> None:
    """QueueError unless a process that listens with this public key has our join secret."""
    if not hmac.compare_digest(listener, listening_keys(network, purpose).public):
        raise QueueError("a process on another host has another join secret", hint="give all hosts the same one")


def join_key(network: Network | None) -> str:
    """For the cluster's config: what tells its join secret from others, and no more than that."""
    return listening_keys(network).public.decode("ascii") if network is not None else ""


def require_joined(config: ClusterConfig, network: Network | None) -> None:
    """ConfigError unless a role with this network can work in the cluster: both span hosts, with one join secret."""
    if config.join_key == join_key(network):
        return
    hint = "give each role --advertise and the join secret of the host on which the cluster was begun"
    if network is None:
        raise ConfigError(f"cluster {config.cluster!r} spans hosts, and this role has no --advertise", hint=hint)
    if config.join_key:
        raise ConfigError(f"cluster {config.cluster!r} has another join secret than this role", hint=hint)
    raise ConfigError(
        f"cluster {config.cluster!r} is on one host: it was begun without --advertise",
        hint="begin it by `elastic serve --advertise` or `elastic init --join-secret-file`, or start this role without",
    )


def require_reachable(state: ClusterState, node: str, network: Network | None) -> None:
    """ConfigError if another host is there, and it or this one is at a loopback address. On one host all may be."""
    if network is None:
        return
    here = this_host()
    others = {agent.node: agent.address for agent in state.agents.values() if agent.address and agent.host != here}
    engine = state.engine
    if engine is not None and engine.remote and engine.host != here:
        others[engine.node] = urlsplit(engine.remote).hostname or ""
    others.pop(node, None)  # what it was before a restart
    for other, address in sorted(others.items()):
        if is_loopback(network.address):
            raise ConfigError(
                f"--advertise {network.address}: host {other} cannot reach this one there",
                hint="give an address of this host's network",
            )
        if is_loopback(address):
            raise ConfigError(
                f"host {other} is at {address}, where this one cannot reach it",
                hint="start that one with --advertise and an address of its network",
            )


def _derived(network: Network, side: str) -> CurveKeys:
    import zmq  # only where there are several hosts
    from zmq.utils import z85

    purpose = f"elastic-ep 1 {side} {network.cluster}".encode()
    secret = z85.encode(hmac.digest(network.secret, purpose, "sha256"))
    return CurveKeys(zmq.curve_public(secret), secret)
