"""The window of measured expert load: what it sums up, when it publishes, and what is then shown of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from elastic.cli.render import status_view
from elastic.engine.expert_load import DIFFERENT, ENOUGH, PERIOD_S, PERIODS, REPEAT, LoadWindow
from elastic.gateway.metrics import GatewayMetrics
from elastic.status import cluster_status
from membership.store.records import ExpertLoad
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit


class Scene:
    """One window over 2 layers of 4 experts, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.window = LoadWindow(2, 4, self.now)

    def period(self, *layers: list[int]) -> ExpertLoad | None:
        """Route `rows` per expert in the next period, half by each of two ranks; what is published at its end."""
        for _ in range(2):
            self.window.add((np.array(layers, dtype=np.uint32) // 2).tobytes())
        self.now += PERIOD_S
        return self.window.due(self.now, 1000.0 + self.now)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_ranks_are_added_up_and_published_in_16ths_of_the_mean(scene: Scene) -> None:
    published = scene.period([400, 0, 200, 200], [100, 100, 100, 100])
    assert published == ExpertLoad(at=1005.0, loads=((32, 0, 16, 16), (16, 16, 16, 16)))


def test_too_little_says_nothing_and_adds_up(scene: Scene) -> None:
    few = [ENOUGH // 2] * 4
    assert scene.period(few, few) is None
    assert scene.period(few, few) is not None


def test_nothing_is_published_within_a_period(scene: Scene) -> None:
    scene.window.add(np.full((2, 4), 1000, dtype=np.uint32).tobytes())
    assert scene.window.due(PERIOD_S / 2, 0.0) is None


def test_noise_is_not_published_and_change_is(scene: Scene) -> None:
    even = [160, 160, 160, 160]
    assert scene.period(even, even) is not None
    assert scene.period([160, 162, 158, 160], even) is None
    published = scene.period([1000, 0, 0, 0], even)
    assert published is not None
    assert published.loads[0][0] >= 16 + DIFFERENT


def test_the_past_is_forgotten(scene: Scene) -> None:
    even = [400, 400, 400, 400]
    scene.period([1600, 0, 0, 0], even)
    published = [scene.period(even, even) for _ in range(PERIODS)]
    assert next(t for t in reversed(published) if t is not None).loads == ((16,) * 4,) * 2


def test_what_may_not_have_arrived_is_published_again(scene: Scene) -> None:
    even = [160, 160, 160, 160]
    published = [scene.period(even, even) is not None for _ in range(1 + REPEAT)]
    assert published == [True] + [False] * (REPEAT - 1) + [True]


def test_a_count_of_another_shape_is_left_out(scene: Scene) -> None:
    even = [160, 160, 160, 160]
    scene.window.add(b"")
    scene.window.add(np.full(5, 10**6, dtype=np.uint32).tobytes())
    published = scene.period(even, even)
    assert published is not None
    assert published.loads == ((16,) * 4,) * 2


def test_imbalance_is_in_status_and_metrics_once_it_is_measured(tmp_path: Path) -> None:
    world = World(desired=4, config=replace(CONFIG, rebalance_bytes=0))
    world.settle()
    metrics = GatewayMetrics(lambda: world.state, tmp_path / "events.jsonl", CONFIG.cluster)
    assert cluster_status(world.state, world.now).imbalance is None
    assert b"expert_imbalance_ratio" not in metrics.exposition()
    view = world.state.view
    assert view is not None
    loads = tuple(tuple(64 if e in held else 0 for e in range(8)) for held in view.placement[0])
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=loads))
    found = cluster_status(world.state, world.now).imbalance
    assert found is not None
    assert found > 1.5, "half of the work is rank 0's"
    assert f"elastic_ep_expert_imbalance_ratio {found}".encode() in metrics.exposition()
    document = {"cluster": "c", "state": "serving", "epoch": 1, "desired": 1, "ranks": [], "imbalance": found}
    document |= {"coverage": {"min_live_replicas": 2}, "requests": {"running": 0, "waiting": 0}}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(status_view(document))
    assert f"expert load {found:.2f}x the mean" in console.export_text()
