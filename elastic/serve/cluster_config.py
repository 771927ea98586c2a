"""The cluster configuration that `elastic serve` and `elastic init` store: made from its options and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from elastic.serve.gpu_memory import FLAG, Plan, kv_blocks
from elastic.serve.gpus import probe
from elastic.serve.model_check import require_model
from elastic.serve.options import DEFAULT_RANKS, DEFAULTS, InitOptions, ServeOptions, check_options
from membership.base.enums import Device
from membership.base.errors import ConfigError, PlanRefused
from membership.planning.cluster_facts import scale_refusal
from membership.store.records import ClusterConfig
from workers.model.content import small_files
from workers.model.families import ModelInfo

GPU_TOKENS = 2048  # of a rank and step: fewer are bound by reading the weights, and by how fast the host launches


def cluster_config(options: ServeOptions | InitOptions) -> ClusterConfig:
    """Check the options against the model. Raises ModelError, ConfigError or PlanRefused."""
    check_options(options)
    ranks = options.ranks or DEFAULT_RANKS
    _check_gpu_exchange(options.gpu_exchange, options.device, ranks)
    info = require_model(options.model)
    directory = options.model.resolve()
    names = _listed(options.served_model_name) or (directory.name,)
    as_given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    longest = min(info.max_position, options.max_model_len or DEFAULTS["max_model_len"])
    derived = dict(
        cluster=options.cluster or directory.name,
        model=str(directory),
        served_model_name=names[0],
        served_model_aliases=names[1:],
        max_batched_tokens=_batched_tokens(options),
        moe_layers=info.moe_layers,
        experts=info.experts,
        expert_bytes=info.expert_bytes(options.dtype),
        max_ranks=options.max_ranks or max(ranks, DEFAULTS["max_ranks"]),
        max_model_len=longest,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        ranks_asked=options.ranks or 0,
        files=tuple(small_files(directory).items()),
    )
    if options.kv_cache_memory:
        derived["kv_blocks"] = _kv_blocks(options, info, ranks, longest)
    config = ClusterConfig(**{**as_given, **derived})
    refused = scale_refusal(config, ranks)
    if refused:
        raise PlanRefused(refused)
    return config


def _batched_tokens(options: ServeOptions | InitOptions) -> int:
    on_gpus = options.device is Device.CUDA or options.gpu_exchange
    return GPU_TOKENS if on_gpus else int(DEFAULTS["max_batched_tokens"])


def _kv_blocks(options: ServeOptions | InitOptions, info: ModelInfo, ranks: int, longest: int) -> int:
    """What `--kv-cache-memory` comes to on this machine's GPUs. ConfigError."""
    flag = f"{FLAG} {options.kv_cache_memory:g}"
    if options.device is Device.CPU:
        raise ConfigError(f"{flag}: ranks compute on the CPU", hint="use --kv-blocks, or --device cuda")
    if options.kv_blocks != DEFAULTS["kv_blocks"]:
        raise ConfigError(f"{flag} and --kv-blocks {options.kv_blocks} say different things", hint="give one of them")
    spares = options.spares if isinstance(options, ServeOptions) else 0
    plan = Plan(ranks, options.redundancy, spares, options.gpu_exchange, _batched_tokens(options))
    block_size = DEFAULTS["block_size"]
    return kv_blocks(options.kv_cache_memory, probe().each, info, plan, block_size, longest, options.dtype)


def _check_gpu_exchange(slots: int, device: Device, ranks: int) -> None:
    """ConfigError if rows certainly cannot travel between GPUs. What only the GPUs know, an event reports."""
    flag = f"--gpu-exchange {slots}"
    if slots and device is Device.CPU:
        raise ConfigError(f"{flag}: ranks compute on the CPU", hint="use --device cuda, or leave it out")
    if slots == 1:
        raise ConfigError(f"{flag}: rows travel between two ranks at least", hint="use 0, or a number from 2 to 8")
    if slots and ranks > slots:
        raise ConfigError(f"{flag}: there are {ranks} ranks", hint=f"use --gpu-exchange {ranks}, 8 at most")


def _listed(given: Sequence[str]) -> tuple[str, ...]:
    """Names that were given one by one, or with commas; each once."""
    names = (name.strip() for each in given for name in each.split(","))
    return tuple(dict.fromkeys(filter(None, names)))
