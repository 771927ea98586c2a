"""What `elastic serve` was asked for, whether it can be meant, and the cluster that it makes of a model."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path

from membership.base.errors import ConfigError, PlanRefused
from membership.planning.cluster_facts import scale_refusal
from membership.store.records import ClusterConfig
from workers.model.families import read_model_info

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "exactness": ("invariant", "stock"),
    "device": ("auto", "cpu", "cuda"),
}


@dataclass(frozen=True)
class ServeOptions:
    """What `elastic serve` was asked for."""

    model: Path
    ranks: int = 4
    max_ranks: int | None = None
    spares: int = 0
    redundancy: float = 2.0
    etcd: tuple[str, ...] = ()
    cluster: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int = 8001
    state_dir: Path | None = None
    served_model_name: str = ""
    dtype: str = "auto"
    exactness: str = "invariant"
    device: str = "auto"
    max_model_len: int | None = None
    kv_blocks: int = 1024
    follow_agents: int = 0
    restart_intensity: int = 6
    restart_window_s: float = 60.0
    rebalance_bytes: int = 2 << 30
    coverage_deadline_s: float = 30.0
    load_bytes_per_s: int = 0
    ready_timeout_s: float = 180.0
    chaos: bool = False
    admin_token: str = field(default_factory=lambda: os.environ.get("ELASTIC_ADMIN_TOKEN") or secrets.token_urlsafe(24))


def cluster_config(options: ServeOptions) -> ClusterConfig:
    """Check the model and the wishes against each other; ModelError, ConfigError or PlanRefused say what is wrong."""
    _check_flags(options)
    info = read_model_info(options.model)
    directory = options.model.resolve()
    config = ClusterConfig(
        cluster=options.cluster or directory.name,
        model=str(directory),
        served_model_name=options.served_model_name or directory.name,
        moe_layers=info.moe_layers,
        experts=info.experts,
        expert_bytes=info.expert_bytes(options.dtype),
        redundancy=options.redundancy,
        max_ranks=options.max_ranks or max(options.ranks, 64),
        dtype=options.dtype,
        exactness=options.exactness,
        device=options.device,
        max_model_len=min(info.max_position, options.max_model_len or 4096),
        kv_blocks=options.kv_blocks,
        follow_agents=options.follow_agents,
        restart_intensity=options.restart_intensity,
        restart_window_s=options.restart_window_s,
        rebalance_bytes=options.rebalance_bytes,
        coverage_deadline_s=options.coverage_deadline_s,
        load_bytes_per_s=options.load_bytes_per_s,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
    )
    refused = scale_refusal(config, options.ranks)
    if refused:
        raise PlanRefused(refused)
    return config


def _check_flags(options: ServeOptions) -> None:
    """ConfigError naming the flag that cannot be meant, whatever the model."""
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: at least one rank is needed", hint="use --ranks 1 or more")
    if options.spares < 0:
        raise ConfigError(f"--spares {options.spares}: it cannot be negative", hint="use --spares 0 or more")
    for name, number in (
        ("max-model-len", options.max_model_len),
        ("kv-blocks", options.kv_blocks),
        ("restart-intensity", options.restart_intensity),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number}: it must be at least 1")
    for name, known in CHOICES.items():
        if (given := getattr(options, name)) not in known:
            raise ConfigError(f"--{name} {given}: there is no such choice", hint=f"choose among {', '.join(known)}")


def require_free_port(host: str, port: int, flag: str) -> None:
    """ConfigError naming the flag if nobody could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "ports go from 0 to 65535"
            raise ConfigError(f"cannot listen on {host}:{port}: {why}", hint=f"choose another {flag}") from error
