"""Runs the tokens of one step through the model on this rank: prefill chunks and decode tokens packed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from membership.base.enums import Exactness
from membership.base.errors import ModelError, RequestError
from workers.model.attention_plan import StepPlan, plan_step
from workers.model.backend import AttentionSpec, KVCache, Reached
from workers.model.calibrations import Calibrations
from workers.model.code import measured_code
from workers.model.expert_bank import LocalExpertBank
from workers.model.grammar import Grammars
from workers.model.hooks import connect_attention, connect_experts
from workers.model.kept_calibrations import KeptCalibrations
from workers.model.kv_transfer import Outbox, Stamp, fetch_in, read_in, take_in, write_out
from workers.model.load import LoadedModel
from workers.model.moe import Dispatcher, MoeLayers, activation_of
from workers.model.rotary import tabulate
from workers.model.row_tiles import RowTiles
from workers.model.sampler import Drawn, sample, scores_of
from workers.protocol.load_progress import LoadProgress
from workers.protocol.messages import NO_TOKEN, SampledToken, Sampling, Score, SeqChunk, TokenLogprobs

SCORED_TOGETHER = 64  # rows


class ModelRunner:
    """A loaded model with its KV cache and its experts, ready to run steps on its backend."""

    def __init__(
        self,
        loaded: LoadedModel,
        bank: LocalExpertBank,
        exactness: Exactness = Exactness.INVARIANT,
        *,
        kv_blocks: int,
        block_size: int,
        max_len: int = 2048,
        progress: LoadProgress | None = None,
    ) -> None:
        """Opens `bank`. `block_size` and `max_len` are in tokens.

        ModelError if the device cannot be as exact as asked.
        """
        self.loaded = loaded
        self.bank = bank
        self.dtype = loaded.dtype
        self._backend = backend = loaded.backend
        self._backbone = loaded.model.get_submodule(loaded.model.base_model_prefix)
        self._head = loaded.model.get_output_embeddings()
        self._logits_scaling = getattr(loaded.model.config, "logits_scaling", 1.0)  # Granite divides by it at the end
        self.moe = MoeLayers(len(loaded.expert_modules), loaded.info.experts)
        invariant = exactness == Exactness.INVARIANT
        kernels = f"{self.fingerprint()}/{backend.device.type}"
        code = measured_code(backend.device.type)
        measured_for = f"{code}\n{torch.get_num_threads()} threads\n{loaded.config_digest}\n{kernels}"
        kept = KeptCalibrations(measured_for) if invariant else None
        activation = activation_of(loaded.expert_modules[0])
        self.products = backend.expert_products(
            activation, exactness, Calibrations(loaded.shared, f"{kernels}/experts", progress, kept)
        )
        bank.open(loaded.source, self.products)
        self.grammars: Grammars | None = None  # of structured output
        self._tiles: RowTiles | None = None
        self._done: StepPlan | None = None  # of the step that just completed
        calibrations = Calibrations(loaded.shared if invariant else None, f"{kernels}/model", progress, kept)
        spec = _attention_spec(loaded, kv_blocks, block_size, max_len)
        with torch.inference_mode():
            tabulate(loaded.model, min(max_len, loaded.info.max_position), loaded.dtype, backend.device)
            backend.fuse(loaded.model)
            try:
                if invariant:
                    self._tiles = backend.make_invariant(loaded.model, calibrations)
                self.attention = backend.attention(spec, exactness, calibrations)
            finally:
                calibrations.keep()
        connect_attention(loaded.attention_modules, self.attention)
        connect_experts(loaded.expert_modules, self.moe)
        self.moe.local = backend.local_experts(bank, activation, (len(loaded.expert_modules), loaded.info.experts))
        self._forward = backend.capture(self._hidden, self.attention, self.moe)
        self.on_launched: Callable[[], None] = _nothing  # a step's kernels run; a failpoint's place

    @property
    def cache(self) -> KVCache:
        """Of this rank's requests."""
        return self.attention.cache

    def fingerprint(self) -> str:
        """How this runner rounds; ranks of one view must agree."""
        return self._backend.fingerprint(self.dtype)

    def attach(self, exchange: Dispatcher) -> None:
        """Where routed experts' rows go from now on."""
        self.moe.exchange = exchange

    @torch.inference_mode()
    def logits(self, chunks: Sequence[SeqChunk], wanted: Sequence[int]) -> Tensor:
        """Run all chunks; the logits [len(wanted), V] after the last token of the chunks with these indices.

        ModelError if a block number is out of range; CoverageLost and PeerTimeout as the exchange raises them.
        """
        hidden, plan = self._step(chunks)
        return self._head_of(hidden, [plan.last[i] for i in wanted])

    def _step(self, chunks: Sequence[SeqChunk], *, together: bool = False) -> tuple[Tensor, StepPlan]:
        rows = sum(len(c.tokens) for c in chunks)
        padded = self._tiles.padded(rows) if self._tiles else rows
        self._check_blocks(chunks)
        plan = plan_step(
            chunks, self.cache.block_size, padded, self._backend.device, self._done, tiled=self.attention.tiled
        )
        self._done = None  # an attempt that fails leaves nothing to build on
        self.moe.begin(plan.rows, together=together)
        hidden = self._forward(plan)
        self.on_launched()
        self._done = plan
        return hidden[:rows], plan

    def _head_of(self, hidden: Tensor, picked: list[int]) -> Tensor:
        """The logits [len(picked), V] of these rows."""
        if not picked:
            return hidden[:0]
        if picked != list(range(len(hidden))):
            hidden = hidden.index_select(0, torch.tensor(picked, device=hidden.device))
        head = cast("Any", self._head)
        out: Tensor = self._tiles.run(head, hidden) if self._tiles else head(hidden)
        return out if self._logits_scaling == 1.0 else out / self._logits_scaling

    def _hidden(self, plan: StepPlan) -> Tensor:
        """The model without its head: the final hidden states [plan.padded, H] of one step."""
        self.attention.plan = plan
        try:
            out = self._backbone(input_ids=plan.tokens, position_ids=plan.positions, use_cache=False)
        finally:
            self.attention.plan = None
        return cast("Tensor", out[0][0])

    def _check_blocks(self, chunks: Sequence[SeqChunk]) -> None:
        """A block number past the cache would land in another head's cells."""
        for chunk in chunks:
            self._check_known(chunk.blocks)

    def _check_known(self, blocks: Sequence[int]) -> None:
        if not 0 <= min(blocks) <= max(blocks) < self.cache.blocks:
            raise ModelError(f"KV blocks {blocks} are not all within 0..{self.cache.blocks - 1}")

    @torch.inference_mode()
    def run(self, chunks: Sequence[SeqChunk], *, together: bool = False) -> list[SampledToken]:
        """Run one step's chunks; sample after those that ask for it, and score those that ask for that.

        `together`: all ranks run it, over `MoeLayers.shared`. CalledOff if one of them did not finish it.
        """
        hidden, plan = self._step(chunks, together=together)
        asked = [chunk for chunk in chunks if chunk.sample is not None]
        logits = self._head_of(hidden, [last for chunk, last in zip(chunks, plan.last, strict=True) if chunk.sample])
        settings = [cast("Sampling", chunk.sample) for chunk in asked]
        positions = [chunk.start + len(chunk.tokens) for chunk in asked]
        try:
            chosen = iter(sample(logits, settings, positions, [chunk.history for chunk in asked], self.grammars))
        finally:
            self._confirm()  # first: what was called off may be why the sampler failed
        results = []
        for chunk, last in zip(chunks, plan.last, strict=True):
            drawn = next(chosen) if chunk.sample is not None else Drawn(NO_TOKEN)
            scores: list[TokenLogprobs] = []
            try:
                if chunk.score is not None and not drawn.error:
                    scores = self._scores(hidden, last + 1 - len(chunk.tokens), chunk.score)
            except RequestError as error:  # of this request alone
                drawn = Drawn(NO_TOKEN, error=str(error))
            if chunk.sample is not None or chunk.score is not None:
                results.append(SampledToken(chunk.seq, drawn.token, drawn.logprobs, scores, drawn.error))
        return results

    def _confirm(self) -> None:
        """CalledOff if the step's results mean nothing: then the next one builds on nothing, either."""
        done, self._done = self._done, None
        self.moe.check()
        self._backend.finish()  # also where nothing was sampled: what is answered may be read once this rank is dead
        self._done = done

    def _scores(self, hidden: Tensor, first: int, score: Score) -> list[TokenLogprobs]:
        """What follows the rows from `first` on; a few rows at a time, as each has a logit for every token."""
        found: list[TokenLogprobs] = []
        for start in range(0, len(score.targets), SCORED_TOGETHER):
            part = Score(score.targets[start : start + SCORED_TOGETHER], score.top)
            rows = [first + start + row for row in range(len(part.targets))]
            found += scores_of(self._head_of(hidden, rows), part)
        return found

    @torch.inference_mode()
    def write_out(self, blocks: Sequence[int], outbox: Outbox, stamp: Stamp) -> int:
        """Copy KV blocks, from the first on, as far as there is room; returns how many. ModelError, RankError."""
        self._check_known(blocks)
        return write_out(self.cache, blocks, outbox, stamp)

    @torch.inference_mode()
    def take_in(self, blocks: Sequence[int], room: memoryview[int], stamp: Stamp) -> int:
        """Fill KV blocks with what another rank has written out; returns how many. ModelError, RankError."""
        self._check_known(blocks)
        self._done = None  # what the last step gathered may be of sequences that had these blocks before
        return self._taken(take_in(self.cache, blocks, room, stamp))

    @torch.inference_mode()
    def read_in(self, blocks: Sequence[int], pool: int, there: Sequence[int]) -> int:
        """Fill KV blocks with those of another rank's `pool`, a descriptor of its memory; returns how many.

        ModelError, RankError.
        """
        self._check_known(blocks)
        self._done = None  # as in `take_in`
        return self._taken(read_in(self.cache, blocks, pool, there))

    @torch.inference_mode()
    def fetch_in(self, blocks: Sequence[int], pool: Reached, there: Sequence[int]) -> int:
        """The same, with a pool on a device. ModelError, RankError."""
        self._check_known(blocks)
        self._check_known(there)
        self._done = None
        return self._taken(fetch_in(self.cache, blocks, pool, there))

    def _taken(self, count: int) -> int:
        """Blocks that have come are known to the engine only once they are there: it may have them read elsewhere."""
        self._backend.finish()
        return count

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


def _attention_spec(loaded: LoadedModel, kv_blocks: int, block_size: int, longest: int) -> AttentionSpec:
    """Shapes as the config gives them; latent attention (DeepSeek) has keys wider than values."""
    config = loaded.model.config
    heads = config.num_attention_heads
    latent = getattr(config, "qk_nope_head_dim", None)
    if latent is not None:
        group, key_width, value_width = 1, latent + config.qk_rope_head_dim, config.v_head_dim
    else:
        key_width = value_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        group = heads // config.num_key_value_heads
    return AttentionSpec(
        layers=loaded.info.layers,
        group=group,
        key_width=key_width,
        value_width=value_width,
        longest=longest,
        blocks=kv_blocks,
        block_size=block_size,
        dtype=loaded.dtype,
    )


def _nothing() -> None:
    """No more than that."""


class _NoExperts:
    """Takes the place of an exchange while warming up."""

    def stays(self) -> bool:
        """No experts are here yet."""
        return False

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Nothing comes back from experts."""
        return torch.zeros_like(hidden)
