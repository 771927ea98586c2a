"""Runs the tokens of one step through the model on this rank: prefill chunks and decode tokens packed together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.model.attention import AttentionHook, check_tiles
from workers.model.attention_plan import StepPlan, plan_step
from workers.model.calibrations import Calibrations
from workers.model.experts import Dispatcher, LocalExpertBank, MoeHook, activation_of
from workers.model.fingerprint import kernel_fingerprint
from workers.model.kv import KVCache
from workers.model.kv_transfer import Outbox, Stamp, take_in, write_out
from workers.model.linear import RowTiles, make_invariant
from workers.model.load import LoadedModel
from workers.model.rotary import tabulate
from workers.model.sampler import sample
from workers.protocol.messages import SampledToken, Sampling, SeqChunk


class ModelRunner:
    """A loaded model with its KV cache and its hooks, as exact as its expert bank."""

    def __init__(
        self, loaded: LoadedModel, bank: LocalExpertBank, *, kv_blocks: int, block_size: int, max_len: int = 2048
    ) -> None:
        self.invariant = bank.invariant
        self.loaded = loaded
        self.bank = bank
        self.dtype = loaded.dtype
        self._device = loaded.device
        self._backbone = loaded.model.get_submodule(loaded.model.base_model_prefix)
        self._head = loaded.model.get_output_embeddings()
        kv_dtype = torch.float32 if loaded.device.type == "cpu" else loaded.dtype
        self.cache = KVCache(loaded.info.layers, kv_blocks, block_size, kv_dtype)
        self.moe = MoeHook(loaded.expert_modules, loaded.info.experts)
        self.attention = AttentionHook(loaded.attention_modules, self.cache)
        self.activation = activation_of(loaded.expert_modules[0])
        kernels = f"{kernel_fingerprint(loaded.dtype, loaded.device)}/{loaded.device.type}"
        bank.open(loaded.source, self.activation, Calibrations(loaded.shared, f"{kernels}/experts"))
        self._tiles: RowTiles | None = None
        self._done: StepPlan | None = None  # of the step that just completed
        with torch.inference_mode():
            longest = min(max_len, loaded.info.max_position)
            tabulate(loaded.model, longest, loaded.dtype, loaded.device)
            if self.invariant:
                calibrations = Calibrations(loaded.shared, f"{kernels}/model")
                self._tiles = make_invariant(loaded.model, calibrations)
                measure = partial(self._check_attention, max_len)
                (self.attention.min_rows,) = calibrations.of(f"attention over {max_len}", measure)
                calibrations.keep()

    def _check_attention(self, max_len: int) -> tuple[int]:
        """Shapes as the config gives them; latent attention (DeepSeek) has keys wider than values."""
        config = self.loaded.model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        latent = getattr(config, "qk_nope_head_dim", None)
        if latent is not None:
            return (check_tiles(1, latent + config.qk_rope_head_dim, config.v_head_dim, max_len),)
        return (check_tiles(heads // config.num_key_value_heads, width, width, max_len),)

    def attach(self, exchange: Dispatcher) -> None:
        """Where routed experts' rows go from now on."""
        self.moe.exchange = exchange

    @torch.inference_mode()
    def logits(self, chunks: Sequence[SeqChunk], wanted: Sequence[int]) -> Tensor:
        """Run all chunks; the logits [len(wanted), V] after the last token of the chunks with these indices."""
        rows = sum(len(c.tokens) for c in chunks)
        padded = self._tiles.padded(rows) if self._tiles else rows
        self._check_blocks(chunks)
        plan = plan_step(chunks, self.cache.block_size, padded, self._device, self._done)
        self._done = None  # an attempt that fails leaves nothing to build on
        self.attention.plan = plan
        self.moe.rows = rows
        try:
            hidden = self._backbone(input_ids=plan.tokens, position_ids=plan.positions, use_cache=False)[0][0]
        finally:
            self.attention.plan = None
        self._done = plan
        if not wanted:
            return cast("Tensor", hidden[:0])
        picked = [plan.last[i] for i in wanted]
        if picked != list(range(rows)):
            hidden = hidden.index_select(0, torch.tensor(picked, device=self._device))
        else:
            hidden = hidden[:rows]
        head = cast("Any", self._head)
        out: Tensor = self._tiles.run(head, hidden) if self._tiles else head(hidden)
        return out

    def _check_blocks(self, chunks: Sequence[SeqChunk]) -> None:
        """A block number past the cache would land in another head's cells."""
        for chunk in chunks:
            self._check_known(chunk.blocks)

    def _check_known(self, blocks: Sequence[int]) -> None:
        if not 0 <= min(blocks) <= max(blocks) < self.cache.blocks:
            raise ModelError(f"KV blocks {blocks} are not all within 0..{self.cache.blocks - 1}")

    def run(self, chunks: Sequence[SeqChunk]) -> list[SampledToken]:
        """Run one step's chunks and sample after those that ask for it."""
        wanted = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
        logits = self.logits(chunks, wanted)
        asked = [chunks[i] for i in wanted]
        settings = [cast("Sampling", chunk.sample) for chunk in asked]
        chosen = sample(logits, settings, [c.start + len(c.tokens) for c in asked])
        return [SampledToken(c.seq, token, logs) for c, (token, logs) in zip(asked, chosen, strict=True)]

    @torch.inference_mode()
    def write_out(self, blocks: Sequence[int], outbox: Outbox, stamp: Stamp) -> int:
        """Copy KV blocks, as many as there is room for; how many that were."""
        self._check_known(blocks)
        return write_out(self.cache, blocks, outbox, stamp)

    @torch.inference_mode()
    def take_in(self, blocks: Sequence[int], room: memoryview[int], stamp: Stamp) -> int:
        """Fill KV blocks with what another rank has written out."""
        self._check_known(blocks)
        self._done = None  # what the last step gathered may be of sequences that had these blocks before
        return take_in(self.cache, blocks, room, stamp)

    def take_load(self) -> bytes:
        """Rows routed to each (MoE layer, expert) since the last call, as uint32 in C order."""
        return self.moe.take_load().tobytes()

    def warm_up(self) -> None:
        """Allocate the cache and let the kernels set themselves up, with routed experts left out."""
        attached, self.moe.exchange = self.moe.exchange, _NoExperts()
        try:
            for length in (1, 8):
                self.logits([SeqChunk(0, 0, [0] * length, [0])], [0])
        finally:
            self.moe.exchange = attached
            self.take_load()

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.loaded.checkpoint.close()


class _NoExperts:
    """Stands in for an exchange while warming up."""

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Nothing comes back from experts."""
        return torch.zeros_like(hidden)
