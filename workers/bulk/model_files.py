"""Config and tokenizer of the checkpoint on a host that has none: whole, from another host's agent.

The cluster's config has a digest of each of these small files, so what comes is right or refused, from any host.
Weights are another matter: ranks take what they need of them (`workers/model/peer_weights.py`).
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path, PurePosixPath

import structlog
import zmq

from membership.base.errors import ConfigError
from membership.base.network import Network
from membership.store.mirror import Mirror
from workers.bulk.client import BulkLink, PeerLost
from workers.protocol.weight_peers import Peer, peers_of, small_file_digest

CONFIG_FILE = "config.json"
ASK_EVERY_S = 1.0
log = structlog.get_logger(__name__)


def model_directory(
    mirror: Mirror, model: str, node: str, keep: Path, network: Network | None, stop: threading.Event
) -> str:
    """Where this host has config and tokenizer: `model`, its own copy; or where the cluster's config has it; else
    `keep`, which is filled if need be.

    ConfigError: no host has sent them within the time of a launch.
    """
    config = mirror.state().config
    if config is None:
        return model
    own, wanted = Path(model or config.model), dict(config.files)
    if network is None or CONFIG_FILE not in wanted or (own / CONFIG_FILE).is_file():
        return model
    if _has(keep, wanted):
        return str(keep)
    deadline, why = time.monotonic() + config.launch_deadline_s, ""
    log.info("model_files_awaited", path=str(own), files=sorted(wanted))
    while not stop.is_set():
        for peer in peers_of(mirror.state(), node):
            try:
                files = _taken(peer, network, wanted)
            except PeerLost as error:
                why = str(error)
                log.warning("model_files_refused", node=peer.node, error=why)
                continue
            keep_files(files, keep)
            log.info("model_files_taken", node=peer.node, path=str(keep))
            return str(keep)
        if time.monotonic() > deadline:
            raise ConfigError(
                f"there is no checkpoint at {own}, and no other host has sent its config and tokenizer"
                + (f": {why}" if why else ""),
                hint="start the agent of a host that has it, or give --model",
            )
        stop.wait(ASK_EVERY_S)
    return model


def _has(directory: Path, wanted: dict[str, str]) -> bool:
    paths = {directory / name: digest for name, digest in wanted.items()}
    return all(path.is_file() and small_file_digest(path.read_bytes()) == digest for path, digest in paths.items())


def _taken(peer: Peer, network: Network, wanted: dict[str, str]) -> dict[str, bytes]:
    """All of them. PeerLost: it does not have them as the cluster serves them."""
    found: dict[str, bytes] = {}
    with zmq.Context(io_threads=1) as context:
        link = BulkLink(peer, network, context)
        try:
            for name, digest in wanted.items():
                found[name] = link.file(name)
                if small_file_digest(found[name]) != digest:
                    raise PeerLost(f"node {peer.node} has another {name} than the cluster serves")
        finally:
            link.close()
    return found


def keep_files(files: dict[str, bytes], directory: Path) -> None:
    """Put them there atomically: a gateway of this host may do the same."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-files-", dir=directory.parent) as made:
        draft = Path(made) / "new"
        for name, data in files.items():
            if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                raise ConfigError(f"the cluster's config names a file outside of its checkpoint: {name}")
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(data)
        try:
            if directory.exists():
                directory.rename(Path(made) / "old")  # of another model
            draft.rename(directory)
        except OSError:  # another role has just done it
            if not _has(directory, {name: small_file_digest(data) for name, data in files.items()}):
                raise
