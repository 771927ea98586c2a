"""The cluster that the checks of scheduler and journal serve with."""

from __future__ import annotations

from membership.store.records import ClusterConfig

SERVED = ClusterConfig(
    cluster="check", model="/m", served_model_name="m", moe_layers=2, experts=8, max_ranks=12, block_size=4,
    kv_blocks=60, max_batched_tokens=9, max_seqs=6, max_model_len=48, eos_token_ids=(3,), vocab_size=50,
)  # fmt: skip
