"""The cluster configuration that `elastic serve` and `elastic init` store: made from its options and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from elastic.serve.gpu_memory import FLAG, GPU_TOKENS, Plan, kv_blocks
from elastic.serve.gpus import exchange_slots, probe, usable
from elastic.serve.model_check import require_model
from elastic.serve.options import DEFAULT_RANKS, DEFAULTS, InitOptions, ServeOptions, check_options
from membership.base.enums import Device
from membership.base.errors import ConfigError, PlanRefused
from membership.planning.cluster_facts import scale_refusal
from membership.store.records import ClusterConfig
from workers.model.content import small_files
from workers.model.families import ModelInfo


def cluster_config(options: ServeOptions | InitOptions) -> ClusterConfig:
    """Check the options against the model. Raises ModelError, ConfigError or PlanRefused."""
    check_options(options)
    ranks = options.ranks or DEFAULT_RANKS
    slots, reason = _gpu_exchange(options, ranks)
    info = require_model(options.model)
    directory = options.model.resolve()
    names = _listed(options.served_model_name) or (directory.name,)
    as_given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    longest = min(info.max_position, options.max_model_len or DEFAULTS["max_model_len"])
    batched = GPU_TOKENS if options.device is Device.CUDA or slots else DEFAULTS["max_batched_tokens"]
    derived = dict(
        cluster=options.cluster or directory.name,
        model=str(directory),
        served_model_name=names[0],
        served_model_aliases=names[1:],
        max_batched_tokens=batched,
        moe_layers=info.moe_layers,
        experts=info.experts,
        expert_bytes=info.expert_bytes(options.dtype),
        max_ranks=options.max_ranks or max(ranks, DEFAULTS["max_ranks"]),
        max_model_len=longest,
        eos_token_ids=info.eos_token_ids,
        vocab_size=info.vocab_size,
        ranks_asked=options.ranks or 0,
        files=tuple(small_files(directory).items()),
        gpu_exchange=slots,
        gpu_exchange_reason=reason,
    )
    if options.kv_cache_memory:
        spares = options.spares if isinstance(options, ServeOptions) else 0
        plan = Plan(ranks, options.redundancy, spares, slots, batched)
        derived["kv_blocks"] = _kv_blocks(options, info, plan, longest)
    config = ClusterConfig(**{**as_given, **derived})
    refused = scale_refusal(config, ranks)
    if refused:
        raise PlanRefused(refused)
    return config


def _kv_blocks(options: ServeOptions | InitOptions, info: ModelInfo, plan: Plan, longest: int) -> int:
    """What `--kv-cache-memory` comes to on this machine's GPUs. ConfigError."""
    flag = f"{FLAG} {options.kv_cache_memory:g}"
    if options.device is Device.CPU:
        raise ConfigError(f"{flag}: ranks compute on the CPU", hint="use --kv-blocks, or --device cuda")
    if options.kv_blocks != DEFAULTS["kv_blocks"]:
        raise ConfigError(f"{flag} and --kv-blocks {options.kv_blocks} say different things", hint="give one of them")
    block_size = DEFAULTS["block_size"]
    return kv_blocks(options.kv_cache_memory, probe().each, info, plan, block_size, longest, options.dtype)


def _gpu_exchange(options: ServeOptions | InitOptions, ranks: int) -> tuple[int, str]:
    """Ranks whose rows may travel between GPUs, and why not if it is 0 without being asked for. ConfigError if they
    are asked for and certainly cannot. What only the ranks find out, an event reports."""
    if (asked := options.gpu_exchange) is not None:
        _check_gpu_exchange(asked, options.device, ranks)
        return asked, ""
    if options.device is Device.CPU:
        return 0, "ranks compute on the CPU"
    if isinstance(options, InitOptions) or options.advertise:
        return 0, "ranks are on several hosts; within one it takes --gpu-exchange"
    try:
        slots, reason = exchange_slots(probe(), ranks, options.max_ranks or 0)
    except ConfigError as error:
        return 0, str(error)
    reason = reason or usable()
    return (0, reason) if reason else (slots, "")


def _check_gpu_exchange(slots: int, device: Device, ranks: int) -> None:
    """ConfigError if rows certainly cannot travel between GPUs."""
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
