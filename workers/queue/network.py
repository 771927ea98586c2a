"""The keys of connections between hosts: all hosts of a cluster derive them from its join secret.

Nothing secret is in a record. For each purpose one pair of keys is for the side that listens, one for the side that
connects; each side knows the other's public half by itself, so a record that names another one is refused.

Which secret a process listens with is what the cluster's config says (`join_key`, a public half) when it begins to. Who
connects takes the secret that the listener's public key is of. So a cluster may use two at a time, while it goes over
from one to the other (`membership/operations/rotate_keys.py`). Afterwards the one before is retired: who connects
refuses it, whatever its host's file still has.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from enum import StrEnum
from functools import cache
from urllib.parse import urlsplit

from membership.base.errors import ConfigError, QueueError
from membership.base.network import Network, is_loopback
from membership.store.records import ClusterConfig, ClusterState
from workers.queue.handle import CurveKeys, Handle, Remote, this_host


class Purpose(StrEnum):
    """What keys are for: those of one purpose open no connection of another."""

    RANKS = ""  # steps, answers and rows
    GATEWAYS = "gateways "
    WEIGHTS = "weights "


def listening_keys(network: Network, purpose: Purpose = Purpose.RANKS) -> CurveKeys:
    """The keys of the side that is connected to."""
    return _derived(network, f"{purpose}listening")


def connecting_keys(network: Network, purpose: Purpose = Purpose.RANKS) -> CurveKeys:
    """The keys of the side that connects."""
    return _derived(network, f"{purpose}connecting")


def remote_of(network: Network, purpose: Purpose = Purpose.RANKS) -> Remote:
    """How a queue serves readers on other hosts."""
    allowed = frozenset({connecting_keys(network, purpose).public})
    return Remote(network.address, listening_keys(network, purpose), allowed, network.ports)


def keys_for(handle: Handle, network: Network | None) -> CurveKeys | None:
    """What joining this queue needs; None where its writer is on this host, or does not serve others.

    QueueError if its writer has another join secret.
    """
    if network is None or not handle.remote or handle.host == this_host():
        return None
    return connecting_keys(same_secret(handle.remote_key, network))


def same_secret(listener: bytes, network: Network, purpose: Purpose = Purpose.RANKS) -> Network:
    """`network` with the secret of who listens with this public key in front.

    QueueError: our file has no such secret by now, or it is retired. What is remembered counts only where there is no
    file to read.
    """
    now = network.read_again()
    for ours in map(now.listening_with, now.secrets):
        if not hmac.compare_digest(listener, listening_keys(ours, purpose).public):
            continue
        if join_key(ours) in now.retired:
            raise QueueError(
                "a process on another host listens with a join secret that was replaced",
                hint="end it: it was not there when the secret was replaced (`elastic keys ls`)",
            )
        return ours
    raise QueueError(
        "a process on another host has another join secret",
        hint="give all hosts the same one; while it is replaced, both (`elastic keys ls`)",
    )


def join_key(network: Network | None) -> str:
    """For the cluster's config: what tells its join secret from others, and no more than that."""
    return listening_keys(network).public.decode("ascii") if network is not None else ""


def join_keys(network: Network | None) -> tuple[str, ...]:
    """The same of all secrets that this host has by now, in any order that is always the same."""
    if network is None:
        return ()
    now = network.read_again()
    return tuple(sorted(join_key(now.listening_with(secret)) for secret in now.secrets))


def refusing_retired(config: ClusterConfig, network: Network | None) -> Network | None:
    """The same, which connects to nothing that listens with a secret that this config says is retired."""
    retired = frozenset(config.join_keys_retired)
    return network if network is None or network.retired == retired else replace(network, retired=retired)


def network_for(config: ClusterConfig, network: Network | None) -> Network | None:
    """What a process that begins now listens with; as it is, if this host lacks the secret that the cluster uses."""
    network = refusing_retired(config, network)
    if network is None:
        return None
    now = network.read_again()
    found = (ours for ours in map(now.listening_with, now.secrets) if join_key(ours) == config.join_key)
    return next(found, now)


def require_joined(config: ClusterConfig, network: Network | None) -> Network | None:
    """The same; ConfigError unless a role can work with it: it and the cluster span hosts, with one join secret."""
    ours = network_for(config, network)
    if config.join_key == join_key(ours):
        return ours
    hint = "give each role --advertise and the join secret of the host on which the cluster was begun"
    if network is None:
        raise ConfigError(f"cluster {config.cluster!r} spans hosts, and this role has no --advertise", hint=hint)
    if config.join_key:
        if config.join_generation:
            hint = "it was replaced: copy the file of a host that has the new one (`elastic keys ls` names them)"
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
    return _derived_from(network.secret, f"elastic-ep 1 {side} {network.cluster}".encode())


@cache
def _derived_from(join_secret: bytes, purpose: bytes) -> CurveKeys:
    import zmq  # only where there are several hosts
    from zmq.utils import z85

    secret = z85.encode(hmac.digest(join_secret, purpose, "sha256"))
    return CurveKeys(zmq.curve_public(secret), secret)
