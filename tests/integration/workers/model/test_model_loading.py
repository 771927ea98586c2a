"""Reading checkpoints: only what a rank owns, in whichever layout it was saved, and clear errors otherwise."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from membership.base.enums import Exactness
from membership.base.errors import ModelError
from tests.support.families import write_checkpoint
from tests.support.local_exchange import LocalExchange
from tests.support.model_helpers import make_runner
from workers.model.expert_bank import LocalExpertBank
from workers.model.families import FAMILIES, read_model_info
from workers.model.load import load_model
from workers.model.packing import is_packed, plain
from workers.model.runner import ModelRunner
from workers.protocol.messages import Sampling, SeqChunk

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("family", FAMILIES)
def test_only_owned_experts_are_read(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family, "bfloat16", shard="100KB")
    info = read_model_info(path)
    assert len(info.files) > 3
    loaded = load_model(path)
    bank = LocalExpertBank()
    runner = ModelRunner(loaded, bank, Exactness.STOCK, kv_blocks=4, block_size=16)
    try:
        assert not any(p.is_meta for p in loaded.model.parameters())
        before = loaded.checkpoint.bytes_read
        intermediate = getattr(loaded.model.config, "moe_intermediate_size", loaded.model.config.intermediate_size)
        one = 3 * 2 * info.hidden * intermediate
        assert bank.load(0, 3) == one
        assert bank.load_all([(0, 3), (1, 0)]) == one  # the first is here already
        assert loaded.checkpoint.bytes_read - before == 2 * one
        assert bank.held() == {(0, 3), (1, 0)}
        assert bank.drop(frozenset({(1, 0)})) == 1
        assert not bank.holds(0, 3)
    finally:
        runner.close()


def test_weights_equal_what_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(tmp_path, "qwen3_moe", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    loaded = load_model(path)
    try:
        dense = loaded.model.state_dict()
        for name, tensor in theirs.state_dict().items():
            if ".experts." not in name:
                assert torch.equal(tensor, plain(dense[name])), name
        experts = theirs.model.layers[1].mlp.experts
        weights = loaded.source.load(1, 5)
        for ours, wanted in ((weights.gate_up, experts.gate_up_proj[5]), (weights.down, experts.down_proj[5])):
            assert torch.equal(plain(ours) if is_packed(ours) else ours.t(), wanted)
    finally:
        loaded.checkpoint.close()


def test_experts_saved_as_one_tensor(tmp_path: Path) -> None:
    """A checkpoint in transformers' own in-memory layout gives the same experts, read by slices."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(tmp_path, "olmoe")
    expected = load_model(path)
    wanted = expected.source.load(1, 2)
    expected.checkpoint.close()
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
    loaded = load_model(path)
    try:
        before = loaded.checkpoint.bytes_read
        found = loaded.source.load(1, 2)
        assert loaded.checkpoint.bytes_read - before == found.nbytes
        assert torch.equal(found.gate_up, wanted.gate_up)
        assert torch.equal(found.down, wanted.down)
    finally:
        loaded.checkpoint.close()


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_checkpoint(tmp_path, "mixtral")
    state = load_file(path / "model.safetensors")
    expert = next(n for n in state if ".experts.3.w1" in n and "layers.0" in n)
    save_file({n: t for n, t in state.items() if n != expert}, path / "model.safetensors")
    loaded = load_model(path)
    with pytest.raises(ModelError, match="lacks"):
        loaded.source.load(0, 3)
    loaded.source.load(0, 4)
    loaded.checkpoint.close()
    save_file({n: t for n, t in state.items() if n != "model.norm.weight"}, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensors, first model\.norm\.weight"):
        load_model(path)


def test_shapes_must_fit_the_config(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"vocab_size": 96', '"vocab_size": 100'))
    with pytest.raises(ModelError, match=r"has shape \(96, 64\), config.json implies \(100, 64\)"):
        load_model(path)


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown dtype"):
        load_model(write_checkpoint(tmp_path, "mixtral"), "int4")


def test_experts_come_and_go_while_the_model_runs(tmp_path: Path) -> None:
    """A background thread keeps loading and dropping spare experts; every step's output stays the same."""
    path = write_checkpoint(tmp_path, "mixtral")
    runner = make_runner(path)
    chunk = SeqChunk(1, 0, list(range(2, 40)), list(range(5)), Sampling(logprobs=2))
    spare = LocalExpertBank()
    spare.open(runner.loaded.source, runner.products)
    everything = [(layer, e) for layer in range(2) for e in range(8)]
    spare.load_all(everything)
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn() -> None:
        try:
            while not stop.is_set():
                spare.drop(frozenset({(0, 0)}))
                spare.load_all(everything)
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    thread = threading.Thread(target=churn)
    try:
        expected = runner.run([chunk])
        both = _Either(runner, spare)
        runner.attach(LocalExchange(both))
        thread.start()
        for _ in range(60):
            assert runner.run([chunk]) == expected
        assert both.from_spare > 100
    finally:
        stop.set()
        if thread.ident:
            thread.join(30)
        runner.close()
    assert not failures


class _Either:
    """Uses the spare bank's expert where it is there at that moment, else the complete bank's."""

    def __init__(self, runner: ModelRunner, spare: LocalExpertBank) -> None:
        self._complete = runner.bank
        self._spare = spare
        self.from_spare = 0

    def holds(self, layer: int, expert: int) -> bool:
        return True

    def padded(self, rows: int) -> int:
        return self._complete.padded(rows)

    def compute_many(self, layer: int, experts: list[int], sizes: list[int], rows: object) -> object:
        if all(self._spare.holds(layer, e) for e in experts):
            try:
                out = self._spare.compute_many(layer, experts, sizes, rows)  # type: ignore[arg-type]
                self.from_spare += len(experts)
                return out
            except ModelError:  # dropped since we asked
                return self._complete.compute_many(layer, experts, sizes, rows)  # type: ignore[arg-type]
        return self._complete.compute_many(layer, experts, sizes, rows)  # type: ignore[arg-type]
