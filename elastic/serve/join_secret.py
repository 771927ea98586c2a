"""The join secret: what a host needs besides etcd to belong to a cluster. From it come the keys of all connections.

`elastic serve --advertise` makes one in its state directory unless it is given one; the other hosts get a copy.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from membership.base.errors import ConfigError
from membership.base.network import Network, bare, is_ipv6, is_loopback, lines_of, ports_of, read_secrets

ENV = "ELASTIC_JOIN_SECRET"
FILE = "join-secret"  # in the state directory
SECRET_BYTES = 32


def network_of(address: str, file: Path | None, cluster: str, port_range: str = "") -> Network | None:
    """This host among others; None if it has no address for them. ConfigError: one of these is no good."""
    if not address:
        return None
    found = _given(file)
    if not found:
        raise ConfigError(
            "--advertise needs the cluster's join secret",
            hint=f"copy {FILE} of the state directory of `elastic serve`, and give --join-secret-file or {ENV}",
        )
    require_ours(address)
    ports, absolute = ports_of(port_range), file.absolute() if file is not None else None
    return Network(bare(address), cluster, found[0], ports, found[1:], absolute)


def secrets_of(file: Path | None, cluster: str) -> Network | None:
    """From which the config of a cluster has its `join_key`; None if no secret is given: it is on one host."""
    found = _given(file)
    return Network("", cluster, found[0], others=found[1:]) if found else None


def made_secret(state_dir: Path) -> Path | None:
    """The file with the secret that was made in this state directory, if one was."""
    file = state_dir / FILE
    return file if file.exists() else None


def make_secret(state_dir: Path) -> Path:
    """The file with the secret in this state directory; it is made once, readable by its owner alone."""
    file, draft = state_dir / FILE, state_dir / f".{FILE}.{os.getpid()}"
    if file.exists():
        return file
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as made:
            made.write(new_secret() + "\n")
            made.flush()
            os.fsync(made.fileno())  # an empty one, after a power cut, would be refused for ever
        draft.replace(file)  # the state directory is claimed, so no other process makes one
    finally:
        draft.unlink(missing_ok=True)
    return file


def new_secret() -> str:
    """A random one."""
    return secrets.token_hex(SECRET_BYTES)


def _given(file: Path | None) -> tuple[bytes, ...]:
    return read_secrets(file) if file is not None else lines_of(os.environ.get(ENV, ""))


def require_ours(address: str) -> None:
    """ConfigError unless this host can listen at this address."""
    try:
        with socket.socket(socket.AF_INET6 if is_ipv6(address) else socket.AF_INET) as probe:
            probe.bind((bare(address), 0))
            found = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"--advertise {address}: this host cannot listen there: {error.strerror or error}",
            hint="give an IPv4 or IPv6 address of this host, or a name of an IPv4 one, that the other hosts reach",
        ) from error
    if is_loopback(found) and not is_loopback(bare(address)):
        raise ConfigError(
            f"--advertise {address}: that is {found}, where no other host reaches this one",
            hint="give an address of this host's network; /etc/hosts often has a host's own name as 127.0.1.1",
        )
