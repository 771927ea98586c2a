"""When a rank's process ends for its device: at once if that is lost, and for want of memory if nothing else helps."""

from __future__ import annotations

from typing import Any, cast

import pytest

from membership.base.errors import DeviceFull, DeviceLost, OutOfDeviceMemory, RankFailed
from workers.rank.device_health import WHAT_TO_CHANGE, DeviceHealth

pytestmark = pytest.mark.unit

SHORT = OutOfDeviceMemory("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
OTHER = ValueError("a broken request")


class Device:
    """A backend that is asked about errors; it is `lost` or not."""

    def __init__(self, lost: bool) -> None:
        self.lost = lost

    def check(self, error: BaseException) -> bool:
        if self.lost:
            raise DeviceLost("cuda:0: launch failure") from error
        return isinstance(error, MemoryError)


def device(*, lost: bool = False) -> Any:
    return cast("Any", Device(lost))


def test_a_step_that_lacks_memory_is_run_again_once() -> None:
    for error in (SHORT, MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):
        health = DeviceHealth()
        health.in_step(device(), error)
        with pytest.raises(DeviceFull) as raised:
            health.in_step(device(), error)
        said = "CUDA out of memory. Tried to allocate 2.00 GiB."
        assert str(raised.value) == f"out of device memory: {said}; {WHAT_TO_CHANGE}"


@pytest.mark.parametrize("between", ["a step that went well", "another error"])
def test_only_lacks_in_a_row_count(between: str) -> None:
    health = DeviceHealth()
    for _ in range(5):
        health.in_step(device(), SHORT)
        if between == "another error":
            health.in_step(device(), OTHER)
        else:
            health.step_done()


def test_a_lost_device_ends_the_rank_at_once() -> None:
    health = DeviceHealth()
    with pytest.raises(DeviceLost, match="launch failure"):
        health.in_step(device(lost=True), OTHER)
    health.beside(device(lost=True), OTHER, serving=True)
    with pytest.raises(DeviceLost, match="launch failure"):
        health.require()


def test_a_rank_that_cannot_load_ends_and_one_that_serves_keeps_what_it_has() -> None:
    health = DeviceHealth()
    health.beside(device(), OTHER, serving=False)
    health.beside(device(), SHORT, serving=True)
    health.require()
    health.beside(None, SHORT, serving=False)
    with pytest.raises(DeviceFull, match="out of device memory"):
        health.require()


def test_a_lack_of_memory_is_one_whatever_wraps_it() -> None:
    wrapped = RankFailed("layer 0, expert 3")
    wrapped.__cause__ = SHORT
    health = DeviceHealth()
    health.in_step(device(), wrapped)
    with pytest.raises(DeviceFull, match="layer 0, expert 3"):
        health.in_step(device(), wrapped)


def test_what_a_steps_own_rows_lack_is_no_refusal_of_peers() -> None:
    """Replicas computed them, and the steps went well."""
    health = DeviceHealth()
    for _ in range(3):
        health.refused(device(), SHORT)
        health.step_done()
        health.answering()
        health.answered()


@pytest.mark.parametrize("error", [SHORT, OTHER])
def test_a_rank_that_refuses_its_peers_for_want_of_memory_twice_in_a_row_ends(error: Exception) -> None:
    health = DeviceHealth()
    for _ in range(3):
        health.refused(device(), error)
        health.answered()
        health.answered()
    health.refused(device(), error)
    health.answered()
    health.refused(device(), error)
    health.refused(device(), error)
    if error is SHORT:
        with pytest.raises(DeviceFull, match="out of device memory"):
            health.answered()
    else:
        health.answered()
    health.refused(device(lost=True), OTHER)
    with pytest.raises(DeviceLost, match="launch failure"):
        health.require()
