"""Runs on a device that is asked for: what hands it on to the cluster, and what refuses rather than leave it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from chaos.campaigns import own_cluster as module
from chaos.campaigns.demo import DemoOptions, on_hosts
from chaos.campaigns.own_cluster import own_cluster
from chaos.cli.shared import RunOptions, device_flags
from chaos.scenarios.reading import find
from elastic.cli.flags import Output
from membership.base.enums import Device
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


def test_a_device_is_not_asked_of_several_hosts() -> None:
    with pytest.raises(ConfigError, match="--device goes with one host"):
        on_hosts(DemoOptions(hosts=2, device=Device.CPU), Output.JSON)


def test_nor_of_what_runs_on_a_cluster_that_is_there() -> None:
    RunOptions().refuse_device("--target")
    with pytest.raises(ConfigError, match="--device goes with a cluster of the run's own"):
        RunOptions(device=Device.CUDA).refuse_device("--target")


def test_a_scenario_serves_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Sequence[str]] = []

    @contextmanager
    def cluster(model: Path, ranks: int, *, flags: Sequence[str], **rest: object) -> Iterator[None]:
        served.append(flags)
        yield

    monkeypatch.setattr(module, "ServedCluster", cluster)
    monkeypatch.setattr(module, "checkpoint", lambda named, folder: tmp_path)
    for device in (Device.AUTO, Device.CUDA):
        with own_cluster(find("kill-rank"), None, device_flags(device)):
            pass
    plain, there = served
    assert (*plain, "--device", "cuda") == tuple(flag for flag in there)
