"""What doctor says of GPUs, from what the driver's tool prints."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from elastic.cli.doctor import Finding, examine
from elastic.cli.doctor_gpus import describe, exchange, fits, software
from elastic.cli.render import in_bytes
from elastic.demo.model import write_demo_model
from elastic.serve.gpu_memory import CONTEXT_BYTES, ModelMemory, Plan, kv_token_bytes
from elastic.serve.gpus import Gpu, Gpus, probe, read_gpus
from membership.placement.plan import plan
from workers.model.families import read_model_info

pytestmark = pytest.mark.unit

LISTED = "0, NVIDIA H200, 580.159.04, 143771, 4, GPU-aa1\n1, NVIDIA H200, 580.159.04, 143771, 1028, GPU-bb2\n"
P2P = """ \t\x1b[4mGPU0\tGPU1\x1b[0m
 GPU0\tX\tOK\t
 GPU1\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
"""
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\t0-31\t0\t\tN/A
GPU1\tNV18\t X \t0-31\t0\t\tN/A

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
TWO = read_gpus(LISTED, P2P, TOPOLOGY)


def tool(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the tool's name, found first."""
    made = folder / "nvidia-smi"
    made.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    made.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_and_what_is_between_them() -> None:
    assert [(gpu.index, gpu.used >> 20) for gpu in TWO.each] == [(0, 4), (1, 1028)]
    *each, between = describe(TWO)
    assert [(found.what, found.level) for found in each] == [("gpu 0", "ok"), ("gpu 1", "ok")]
    assert "580.159.04" in each[0].message
    assert (between.level, between.message) == ("ok", "between all 2 GPUs; links: NV18")


@pytest.mark.parametrize("said", ["NS", "CNS"])
def test_gpus_that_do_not_reach_each_other_are_named(said: str) -> None:
    found = list(describe(read_gpus(LISTED, P2P.replace("OK\t\n", f"{said}\t\n", 1), TOPOLOGY)))[-1]
    assert found.level == "warn"
    assert "not between GPUs 0 and 1" in found.message
    assert "--gpu-exchange" in found.hint


@pytest.mark.parametrize(
    ("link", "remark"), [("NV18", "links: NV18"), ("PIX", "links: PIX (no NVLink)"), ("SYS", "links: SYS (no NVLink)")]
)
def test_a_link_that_is_no_nvlink_is_said(link: str, remark: str) -> None:
    found = list(describe(read_gpus(LISTED, P2P, TOPOLOGY.replace("NV18", link))))[-1]
    assert (found.level, found.message) == ("ok", f"between all 2 GPUs; {remark}")


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [(None, ["GPU-aa1", "GPU-bb2"]), ("1,0", ["GPU-bb2", "GPU-aa1"]), ("GPU-b", ["GPU-bb2"]), ("1,7,0", ["GPU-bb2"]),
     ("", [])],
)  # fmt: skip
def test_ranks_count_the_gpus_that_are_visible_to_them(visible: str | None, uuids: list[str]) -> None:
    found = read_gpus(LISTED, P2P.replace("OK\t\n", "NS\t\n", 1), TOPOLOGY, visible)
    assert [(gpu.index, gpu.uuid) for gpu in found.each] == list(enumerate(uuids))
    if visible in (None, "1,0"):
        assert found.peers == {(1, 0) if visible is None else (0, 1)}, "of 0 and 1 only one way is OK"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3", "cuda-bindings": "13", "nvidia-cuda-nvrtc": "13"}, []),
        (
            {"torch": "2.11.0+cu130", "triton": "3", "nvidia-cuda-nvrtc": "13"},
            ["cuda-bindings not installed: KV blocks"],
        ),
        ({"torch": "2.13.0+cpu", "cuda-bindings": "13"}, ["computes on CPUs alone", "ranks cannot compute on GPUs"]),
        ({}, []),
    ],
)
def test_software_that_cannot_use_the_gpus_is_named(installed: dict[str, str], said: list[str]) -> None:
    def version_of(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    found = list(software(TWO, version_of))
    assert [wanted in each.message for wanted, each in zip(said, found, strict=True)] == [True] * len(said)
    assert not list(software(Gpus(), version_of))


def test_how_rows_travel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.cli.doctor_gpus.usable", lambda: "")
    one = read_gpus(LISTED.splitlines()[0], "", "")
    asked = ((TWO, 2), (TWO, 4), (one, 2), (Gpus(), 2))
    found = [[each.message for each in exchange(gpus, ranks)] for gpus, ranks in asked]
    assert found == [
        ["ranks' rows travel between GPUs, of ranks 0 to 1"],
        ["ranks' rows travel over host memory: 4 ranks share 2 GPUs"],
        ["ranks' rows travel over host memory: there is one GPU here"],
        [],
    ]


def test_one_gpu_has_nobody_to_reach() -> None:
    assert len(list(describe(read_gpus(LISTED.splitlines()[0], "", "")))) == 1


def test_what_ranks_need_is_held_against_each_gpu(tmp_path: Path) -> None:
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(3), 2.0)
    large, small = (Gpu(i, "H200", "580", size, 0) for i, size in enumerate((100 << 30, 1 << 20)))
    found = list(fits(Gpus((large, small)), info, placement, 2.0))
    assert [(each.what, each.level) for each in found] == [("gpu 0 fit", "ok"), ("gpu 1 fit", "warn")]
    assert "--redundancy" in found[1].hint
    slots = {rank: sum(map(len, layers)) for rank, layers in placement.items()}
    expert, here = info.expert_bytes("auto"), slots[0] + slots[2]
    assert sum(slots.values()) == 2 * 4 * 8
    for rank in (0, 2):
        assert f"rank {rank}: 943 kB dense, {in_bytes(slots[rank] * expert)} experts" in found[0].message
    assert f"replicas take {in_bytes(here * expert / 2)} of that" in found[0].message, "each expert is there twice"


def test_windows_and_the_experts_of_a_dead_rank_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves may lack the memory else, though doctor said that all is well."""
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(2), 1.0)
    expert, half = info.expert_bytes("auto"), info.moe_layers * info.experts // 2

    def found(peers: frozenset[tuple[int, int]], missing: str = "") -> str:
        monkeypatch.setattr("elastic.cli.doctor_gpus.usable", lambda: missing)
        gpus = Gpus(tuple(Gpu(i, "H200", "580", 100 << 30, 0) for i in range(2)), peers)
        return next(fits(gpus, info, placement, 1.0)).message

    both = frozenset({(0, 1), (1, 0)})
    window = Plan(2, 1.0, gpu_exchange=2, rows=2048).window(info)
    assert f", {in_bytes(window)} rows of others," in found(both)
    assert "rows of others" not in found(frozenset()) + found(both, "there is no Python package triton")
    experts = in_bytes(half * expert)
    assert f"{experts} experts and {experts} more while another rank is dead" in found(both)
    memory = ModelMemory.of(info)
    cache = memory.kv_token * 1024 * 16
    assert f"need {in_bytes(memory.dense + 2 * half * expert + window + cache + CONTEXT_BYTES)} of" in found(both)


def test_memory_that_others_use_is_said(tmp_path: Path) -> None:
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(1), 1.0)
    (found,) = fits(Gpus((Gpu(0, "H200", "580", 8 << 30, 7 << 30),)), info, placement, 1.0)
    assert (found.level, "nvidia-smi" in found.hint) == ("warn", True)
    assert "1.07 GB are free" in found.message


def test_a_gpu_without_room_for_a_dead_rank_s_cache_is_named(tmp_path: Path) -> None:
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(1), 1.0)

    def found(size: int) -> Finding:
        return next(fits(Gpus((Gpu(0, "H200", "580", size, 0),)), info, placement, 1.0))

    low, high = 1 << 20, 1 << 40  # too little, and enough for all
    while high - low > 1 << 16:
        low, high = (
            ((low + high) // 2, high) if "--redundancy" in found((low + high) // 2).hint else (low, (low + high) // 2)
        )
    assert "beside its successor's" in found(high).hint
    assert found(1 << 40).level == "ok"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, 48 * 2048),
        ({"hidden_size": 64, "num_attention_heads": 4}, 48 * 256),
        ({"num_attention_heads": 2, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 4}, 48 * 48),
    ],
    ids=["grouped heads", "all heads", "latent"],
)
def test_a_token_s_share_of_the_cache(config: dict[str, int], expected: int) -> None:
    assert kv_token_bytes({"num_hidden_layers": 48} | config, 2) == expected


def test_the_driver_s_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("listed", LISTED), ("p2p", P2P), ("topology", TOPOLOGY)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = f'"topo -p2p") cat {tmp_path}/p2p;; "topo -m") cat {tmp_path}/topology;; *) cat {tmp_path}/listed;;'
    tool(tmp_path, f'case "$1 $2" in {files} esac', monkeypatch)
    assert probe() == TWO
    found = [each.what for each in examine(None, 2, 2.0) if each.what.startswith("gpu")]
    assert found[:3] == ["gpu 0", "gpu 1", "gpu p2p"], "what follows depends on the packages that are installed here"


def test_gpus_are_known_where_the_tool_cannot_tell_what_is_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "listed").write_text(LISTED, encoding="utf-8")
    tool(tmp_path, f'case "$1" in topo) echo Not supported; exit 3;; *) cat {tmp_path}/listed;; esac', monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = probe()
    assert found.each == TWO.each
    between, rows = list(describe(found))[-1], next(exchange(found, 2))
    assert between.level == "warn"
    for said in (between.message, rows.message):
        assert "what is between GPUs is unknown: nvidia-smi: " in said
        assert "exit status 3" in said


def test_a_driver_that_does_not_answer_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "echo no devices were found; exit 6", monkeypatch)
    (found,) = (each for each in examine(None, 2, 2.0) if each.what == "gpu")
    assert found.level == "warn"


def test_a_machine_without_the_driver_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe() == Gpus()
