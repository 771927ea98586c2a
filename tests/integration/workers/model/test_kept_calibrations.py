"""What was measured stays on disk for the next start, and only what is certain to be ours and whole is believed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.families import write_checkpoint
from tests.support.model_helpers import make_runner
from workers.agent.weight_store import WeightStore
from workers.model import code
from workers.model.calibrations import Calibrations
from workers.model.cpu import expert_products, linear
from workers.model.kept_calibrations import FOLDER, KeptCalibrations
from workers.model.shared_weights import SharedWeights
from workers.protocol.weight_client import WeightClient

pytestmark = pytest.mark.integration
SIZES = {"products": (16, 32), "norms": (1, 16)}


@pytest.fixture
def kept(tmp_path: Path) -> KeptCalibrations:
    made = KeptCalibrations("this model", tmp_path)
    made.save(SIZES)
    return made


@pytest.fixture
def file(tmp_path: Path, kept: KeptCalibrations) -> Path:
    (found,) = (tmp_path / FOLDER).iterdir()
    return found


def test_the_next_start_measures_nothing(tmp_path: Path, kept: KeptCalibrations) -> None:
    again = Calibrations(kept=KeptCalibrations("this model", tmp_path))
    assert again.of("products", lambda: pytest.fail("it is known")) == (16, 32)
    assert again.of("attention", lambda: [4]) == (4,)
    again.keep()
    assert kept.load() == SIZES | {"attention": (4,)}
    assert KeptCalibrations("another model", tmp_path).load() == {}


def test_other_settings_of_the_libraries_are_measured_anew(
    tmp_path: Path, kept: KeptCalibrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert KeptCalibrations("this model", tmp_path).load() == {}
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert KeptCalibrations("this model", tmp_path).load() == SIZES


def test_a_start_after_an_edit_that_touches_no_kernel_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC_CACHE_DIR", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "model", "qwen3_moe")
    make_runner(tmp_path / "model").close()
    before = code.code_version()
    monkeypatch.setattr(code, "ROOMS", ("model",))  # as if code elsewhere were other code
    code.code_version.cache_clear()
    try:
        assert code.code_version() != before
        for place in (linear, expert_products):
            monkeypatch.setattr(place, "calibrate_product", lambda *_: pytest.fail("it was measured"))
        make_runner(tmp_path / "model").close()
    finally:
        code.code_version.cache_clear()


def test_a_damaged_file_is_measured_again_and_replaced(kept: KeptCalibrations, file: Path) -> None:
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], whole.replace(b"32", b"24"), b"{}", os.urandom(100)):
        file.write_bytes(damaged)
        assert kept.load() == {}, damaged
    kept.save({"products": (16,)})
    assert kept.load() == {"products": (16,)}


def test_what_another_user_could_have_written_is_not_believed(kept: KeptCalibrations, file: Path) -> None:
    file.chmod(0o666)
    assert kept.load() == {}
    file.chmod(0o600)
    assert kept.load() == SIZES
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert kept.load() == {}
    file.unlink()
    file.with_name("elsewhere").rename(file)
    file.parent.chmod(0o777)
    assert kept.load() == {}
    if os.geteuid() == 0:
        file.parent.chmod(0o700)
        os.chown(file, 12345, 12345)
        assert kept.load() == {}


def test_a_disk_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "no-directory").touch()
    kept = KeptCalibrations("this model", tmp_path / "no-directory")
    kept.save(SIZES)
    assert kept.load() == {}


def test_ranks_that_write_at_once_leave_a_whole_file(tmp_path: Path, kept: KeptCalibrations) -> None:
    threads = [
        threading.Thread(target=KeptCalibrations("this model", tmp_path).save, args=({f"of {n}": (n,)},))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = kept.load()
    assert SIZES.items() <= found.items()
    assert len(list((tmp_path / FOLDER).iterdir())) == 1, "and nothing else"


@pytest.fixture
def store() -> Iterator[WeightStore]:
    made = WeightStore()
    yield made
    made.close()


def test_ranks_that_start_at_once_measure_once(store: WeightStore) -> None:
    measured, begun, go_on = list[str](), threading.Event(), threading.Event()
    ranks = [Calibrations(SharedWeights(WeightClient(store.handle()), "m"), "k") for _ in range(2)]

    def measure() -> list[int]:
        measured.append("once")
        begun.set()
        assert go_on.wait(30)
        return [16, 32]

    found: list[tuple[int, ...]] = []

    def run(rank: Calibrations) -> None:
        found.append(rank.of("products", measure))
        rank.keep()

    first, second = (threading.Thread(target=run, args=(rank,)) for rank in ranks)
    first.start()
    assert begun.wait(30)
    second.start()
    go_on.set()
    for thread in (first, second):
        thread.join(30)
    assert (found, measured) == ([(16, 32)] * 2, ["once"])
