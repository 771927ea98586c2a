"""Which ranks' rows travel between GPUs if nobody says: by the GPUs, the packages and the options."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from elastic.demo.model import shipped_demo_model
from elastic.serve import cluster_config as module
from elastic.serve.cluster_config import cluster_config
from elastic.serve.gpus import Gpu, Gpus, exchange_slots, usable
from elastic.serve.options import InitOptions, ServeOptions
from elastic.serve.stored_config import differing
from membership.base.enums import Device

pytestmark = pytest.mark.unit

OPTIONS = ServeOptions(model=shipped_demo_model(), ranks=2)


def machine(count: int, *apart: tuple[int, int]) -> Gpus:
    each = tuple(Gpu(i, "H200", "580", 1 << 37, 0) for i in range(count))
    return Gpus(each, frozenset((a, b) for a in range(count) for b in range(count) if a != b and (a, b) not in apart))


@pytest.mark.parametrize(
    ("found", "ranks", "expected"),
    [
        (machine(0), 2, (0, "there is no GPU here")),
        (machine(1), 2, (0, "there is one GPU here")),
        (machine(2), 2, (2, "")),
        (machine(2), 4, (0, "4 ranks share 2 GPUs")),
        (machine(3, (2, 0)), 3, (0, "no P2P between GPUs 0 and 2")),
        (machine(3, (2, 0)), 2, (2, "")),
        (machine(8), 1, (0, "there is one rank; --max-ranks says that there may be more")),
        (machine(16), 8, (8, "")),
        (machine(16), 9, (0, "there are 9 ranks, and rows travel between 8 GPUs at most")),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(found: Gpus, ranks: int, expected: tuple[int, str]) -> None:
    assert exchange_slots(found, ranks) == expected


def test_gpus_without_a_rank_are_left_alone() -> None:
    """A window takes memory of its slot's GPU, which others may use or have filled."""
    assert exchange_slots(machine(8), 2) == (2, "")
    assert exchange_slots(machine(8), 2, 4) == (4, "")
    assert exchange_slots(machine(8), 1, 64) == (8, "")


@pytest.mark.parametrize(
    ("torch", "missing", "said"),
    [
        ("2.13.0+cu130", (), ""),
        ("2.13.0", (), ""),
        ("", (), ""),
        ("2.13.0+cpu", (), "torch 2.13.0+cpu computes on CPUs alone"),
        ("2.13.0+cu130", ("triton",), "there is no Python package triton"),
        ("2.13.0+cu130", ("cuda.bindings.driver",), "there is no Python package cuda.bindings.driver"),
    ],
)
def test_packages_that_it_takes(torch: str, missing: tuple[str, ...], said: str) -> None:
    def version_of(package: str) -> str:
        if not torch:
            raise PackageNotFoundError(package)
        return torch

    def found(name: str) -> object:
        if name == "cuda.bindings.driver" and name in missing:
            raise ModuleNotFoundError("No module named 'cuda'")
        return None if name in missing else object()

    assert usable(version_of, found) == said


def test_rows_travel_between_gpus_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: machine(2))
    monkeypatch.setattr(module, "usable", lambda: "")
    config = cluster_config(OPTIONS)
    assert (config.gpu_exchange, config.gpu_exchange_reason, config.max_batched_tokens) == (2, "", 2048)
    shared = cluster_config(replace(OPTIONS, ranks=4))
    assert (shared.gpu_exchange, shared.gpu_exchange_reason) == (0, "4 ranks share 2 GPUs")
    monkeypatch.setattr(module, "probe", lambda: machine(8))
    assert [cluster_config(replace(OPTIONS, max_ranks=most)).gpu_exchange for most in (None, 4)] == [2, 4]
    monkeypatch.setattr(module, "probe", lambda: machine(2))
    for options, why in (
        (replace(OPTIONS, device=Device.CPU), "ranks compute on the CPU"),
        (replace(OPTIONS, advertise="10.0.0.1"), "ranks are on several hosts"),
        (InitOptions(model=OPTIONS.model, ranks=2), "ranks are on several hosts"),
    ):
        config = cluster_config(options)
        assert (config.gpu_exchange, config.max_batched_tokens) == (0, 512)
        assert config.gpu_exchange_reason.startswith(why)
    config = cluster_config(replace(OPTIONS, gpu_exchange=0))
    assert (config.gpu_exchange, config.gpu_exchange_reason) == (0, "")
    monkeypatch.setattr(module, "usable", lambda: "there is no Python package triton")
    assert cluster_config(OPTIONS).gpu_exchange_reason == "there is no Python package triton"


def test_a_driver_that_does_not_answer_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 6\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = cluster_config(OPTIONS)
    assert config.gpu_exchange == 0
    assert "exit status 6" in config.gpu_exchange_reason


def test_a_host_with_other_gpus_may_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda: machine(2))
    monkeypatch.setattr(module, "usable", lambda: "")
    known = cluster_config(OPTIONS)
    for asked, other in ((None, []), (0, ["gpu_exchange", "max_batched_tokens"])):
        monkeypatch.setattr(module, "probe", Gpus)
        options = replace(OPTIONS, gpu_exchange=asked)
        assert sorted(differing(cluster_config(options), options, known)) == other
