"""What doctor says of GPUs, from what the driver's tool prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from elastic.cli.doctor import Finding, examine
from elastic.cli.doctor_gpus import Gpu, Gpus, describe, fits, kv_token_bytes, probe, read_gpus
from elastic.demo.model import write_demo_model
from membership.placement.plan import plan
from workers.model.families import read_model_info

pytestmark = pytest.mark.unit

LISTED = "0, NVIDIA H200, 580.159.04, 143771, 4\n1, NVIDIA H200, 580.159.04, 143771, 1028\n"
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


def test_one_gpu_has_nobody_to_reach() -> None:
    assert len(list(describe(read_gpus(LISTED.splitlines()[0], "", "")))) == 1


def test_what_ranks_need_is_held_against_each_gpu(tmp_path: Path) -> None:
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(3), 2.0)
    large, small = (Gpu(i, "H200", "580", size, 0) for i, size in enumerate((100 << 30, 1 << 20)))
    found = list(fits((large, small), info, placement))
    assert [(each.what, each.level) for each in found] == [("gpu 0 fit", "ok"), ("gpu 1 fit", "warn")]
    assert "--redundancy" in found[1].hint


def test_a_gpu_without_room_for_a_dead_rank_s_cache_is_named(tmp_path: Path) -> None:
    model = tmp_path / "demo"
    write_demo_model(model)
    info = read_model_info(model)
    placement = plan(info.moe_layers, info.experts, range(1), 1.0)

    def found(size: int) -> Finding:
        return next(fits((Gpu(0, "H200", "580", size, 0),), info, placement))

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
    assert [found.what for found in examine(None, 2, 2.0) if found.what.startswith("gpu")] == [
        "gpu 0",
        "gpu 1",
        "gpu p2p",
    ]


def test_a_driver_that_does_not_answer_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "echo no devices were found; exit 6", monkeypatch)
    (found,) = (each for each in examine(None, 2, 2.0) if each.what == "gpu")
    assert found.level == "warn"


def test_a_machine_without_the_driver_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe() is None
    assert Gpus().each == ()
