"""A decode step of the product's model over several GPUs, each with a share of the experts, as one graph per GPU.

    python -m benchmarks.gpu_shared_step [--ranks 2] [--layers 8] [--streams 1,8,32] [--steps 40]

The same sequences are decoded twice by each rank: with all experts on its GPU, as the product does where no rows
travel, then with its share alone and the others' over `workers/exchange/cuda`, as with `--gpu-exchange`. Prints the
median milliseconds of a step both ways, and whether the tokens are the same. No server.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_checkpoint import make_checkpoint
from benchmarks.gpu_exchange import EXPERTS, LIMIT_S, Page, Rank, Ranks, placement, say
from benchmarks.serve import prompt_token

BLOCK, CONTEXT, WARM = 16, 64, 8
NUMBERS_PER_STEP = 1 << 10


class ModelRank(Rank):
    """Has the model too."""

    def load(self, path: str, streams: int, steps: int) -> dict[str, object]:
        from membership.base.enums import Exactness
        from tests.support.local_exchange import LocalExchange
        from workers.model.devices import open_backend
        from workers.model.expert_bank import LocalExpertBank
        from workers.model.load import load_model
        from workers.model.runner import ModelRunner

        total = CONTEXT + WARM + steps + 2
        self._per_stream = -(-total // BLOCK)
        loaded = load_model(path, "auto", open_backend(f"cuda:{self.me}"))
        bank, layers = LocalExpertBank(), loaded.info.moe_layers
        self._runner = ModelRunner(
            loaded, bank, Exactness.INVARIANT, kv_blocks=streams * self._per_stream, block_size=BLOCK, max_len=total
        )
        bank.load_all([(layer, expert) for layer in range(layers) for expert in range(EXPERTS)])
        self._runner.attach(LocalExchange(bank))
        self._runner.moe.shared = self._shared = self._share(bank, self._runner.products, layers)
        return {}

    def _share(self, bank: Any, products: Any, layers: int) -> Any:
        """As if this rank had its share of the experts alone."""
        from workers.exchange.cuda.calls import DeviceCalls, Reach
        from workers.model.cuda.shared_experts import SharedExperts

        reach = Reach([each.address for each in self._mapped], self.called_off)
        calls = DeviceCalls(self.shape, self.me, EXPERTS, reach, LIMIT_S, layers)
        shared = SharedExperts(calls, self.shape, bank, products.kernels, layers)
        owner = [place[0] if place else None for place in placement(self.ranks, 1, 0)[1]]
        shared.place([owner] * layers)
        return shared

    def decode(self, streams: int, steps: int) -> dict[str, object]:
        found: dict[str, object] = {}
        tokens = {}
        for name in ("all_experts", "share"):
            self.meet()
            tokens[name], times = self._run(streams, steps, together=name == "share")
            found[f"{name}_ms"] = round(statistics.median(times[WARM:]), 2)
        return {**found, "same_tokens": tokens["share"] == tokens["all_experts"]}

    def _run(self, streams: int, steps: int, *, together: bool) -> tuple[list[list[int]], list[float]]:
        from workers.protocol.messages import Sampling, SeqChunk

        blocks = [list(range(s * self._per_stream, (s + 1) * self._per_stream)) for s in range(streams)]
        texts, times = [], []
        for s in range(streams):
            prompt = [prompt_token(1000 * self.me + s, i) for i in range(CONTEXT)]
            texts.append([self._runner.run([SeqChunk(s, 0, prompt, blocks[s], Sampling())])[0].token])
        for step in range(WARM + steps):
            begun = time.perf_counter()
            chunks = [SeqChunk(s, CONTEXT + step, [texts[s][-1]], blocks[s], Sampling()) for s in range(streams)]
            self._base += NUMBERS_PER_STEP
            self._shared.follow(self._base, 0, self.ranks * streams)
            for text, sampled in zip(texts, self._runner.run(chunks, together=together), strict=True):
                text.append(sampled.token)
            times.append(1000 * (time.perf_counter() - begun))
        return texts, times


def main() -> None:
    """Print one JSON line per number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    streams = [int(each) for each in arguments.streams.split(",")]
    with tempfile.TemporaryDirectory(prefix="gpu-") as made:
        maker = mp.get_context("fork").Process(target=make_checkpoint, args=(Path(made), arguments.layers))
        maker.start()  # a process of its own: this one must not touch CUDA before it forks
        maker.join(300)
        ranks = Ranks(arguments.ranks, Page(), ModelRank)
        try:
            ranks.make_windows(ranks.count)  # with a place for every expert
            for rank in range(ranks.count):
                ranks.open(rank, ranks.count)
            ranks.all(do="load", path=made, streams=max(streams), steps=arguments.steps)
            for count in streams:
                found = ranks.all(do="decode", streams=count, steps=arguments.steps)
                say("step", layers=arguments.layers, streams_per_rank=count, ranks=found)
        finally:
            ranks.end()


if __name__ == "__main__":
    main()
