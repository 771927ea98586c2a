"""KV caches as large as a part of the GPUs allows: the arithmetic, what does not fit, and where it makes no sense."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from elastic.demo.model import write_demo_model
from elastic.serve.cluster_config import cluster_config
from elastic.serve.gpu_memory import CONTEXT_BYTES, ModelMemory, Plan, kv_blocks
from elastic.serve.gpus import Gpu
from elastic.serve.options import ServeOptions
from membership.base.enums import Device
from membership.base.errors import ConfigError
from workers.model.families import ModelInfo, read_model_info

pytestmark = pytest.mark.unit

H200 = Gpu(0, "NVIDIA H200", "580", 150_754_820_096, 0)
GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gpu-memory") / "demo"
    write_demo_model(made)
    return made


@pytest.fixture(scope="module")
def info(model: Path) -> ModelInfo:
    return read_model_info(model)


@pytest.mark.parametrize(
    ("plan", "gpus", "caches", "experts"),
    [
        (Plan(2, 2.0), 2, 1, 8),
        (Plan(2, 1.0), 2, 1, 8),  # one may die: the other takes all
        (Plan(5, 1.0), 2, 3, 2),
        (Plan(2, 2.0, spares=2), 2, 2, 8),
        (Plan(4, 1.25, spares=1, gpu_exchange=4, rows=2048), 1, 5, 4),
    ],
)
def test_what_weights_leave_is_shared_out(info: ModelInfo, plan: Plan, gpus: int, caches: int, experts: int) -> None:
    """The caches and all else take nine tenths of a GPU, and one more block in each would be too much."""
    memory = ModelMemory.of(info)
    assert (memory.experts, memory.layers, memory.kv_token) == (8, 4, 4 * 2 * 2 * 32 * 2)
    found = kv_blocks(0.9, [replace(H200, index=i) for i in range(gpus)], info, plan, 16, 4096)
    ranks = -(-plan.ranks // gpus)
    taken = caches * (memory.dense + CONTEXT_BYTES) + ranks * (4 * experts * memory.expert + plan.window(info))
    block = 16 * memory.kv_token

    def all_of(blocks: int) -> int:
        return taken + caches * (blocks + 1) * block

    assert all_of(found) <= 0.9 * H200.total < all_of(found + 1)


def test_what_is_computed_for_others_has_room(info: ModelInfo) -> None:
    """Three banks of rows in the window and a packed one; and for each of three pools of the allocator the results
    of both products."""
    shape = replace(info, hidden=2048, expert_width=768, top_k=8, experts=128)
    room = 2 * 2048 * 8
    words = 3 * 2 * 128 * 8
    assert Plan(2, 1.0, gpu_exchange=2, rows=2048).window(shape) == room * 2 * (4 * 2048 + 3 * (2048 + 768)) + words


def test_the_smallest_gpu_decides(info: ModelInfo) -> None:
    small = replace(H200, index=1, total=20 * GB)
    both, alone = (kv_blocks(0.9, gpus, info, Plan(2, 2.0), 16, 64) for gpus in ([H200, small], [small, small]))
    assert both == alone < kv_blocks(0.9, [H200, H200], info, Plan(2, 2.0), 16, 64)


def test_what_does_not_fit_is_said_part_by_part(info: ModelInfo) -> None:
    small = replace(H200, total=5 * GB)
    with pytest.raises(ConfigError) as raised:
        kv_blocks(0.5, [small], info, Plan(2, 2.0, spares=1), 16, 4096)
    said = str(raised.value)
    for part in (
        "0.5 of a GPU's 5.0 GB is 2.5 GB",
        "2 ranks need",
        "for experts",
        "1 spares",
        "request of 4096 tokens",
    ):
        assert part in said
    assert "--max-model-len" in raised.value.hint


def test_without_a_gpu_there_is_nothing_to_share_out(info: ModelInfo) -> None:
    with pytest.raises(ConfigError, match="there is no GPU here"):
        kv_blocks(0.9, [], info, Plan(2, 2.0), 16, 4096)


def test_a_cluster_gets_what_its_gpus_have(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver's tool, a stand-in here."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in --query*) echo '0, NVIDIA H200, 580, 143771, 4, GPU-aa';; esac\n", "utf-8")
    tool.chmod(0o755)
    options = ServeOptions(model=model, ranks=2, kv_cache_memory=0.9)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.MonkeyPatch.context() as without:
        without.setenv("PATH", str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match="there is no GPU here"):
            cluster_config(options)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    asked = kv_blocks(0.9, [replace(H200, total=143771 << 20)], read_model_info(model), Plan(2, 2.0), 16, 4096)
    assert cluster_config(options).kv_blocks == asked > 100_000
    assert cluster_config(replace(options, kv_cache_memory=0.0)).kv_blocks == 1024
    with pytest.raises(ConfigError, match="ranks compute on the CPU"):
        cluster_config(replace(options, device=Device.CPU))
    with pytest.raises(ConfigError, match="--kv-blocks 7 say different"):
        cluster_config(replace(options, kv_blocks=7))
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 1\.5"):
        cluster_config(replace(options, kv_cache_memory=1.5))
