"""After an error: does the GPU still work for this process? Its stream, whose answer tells, is a stand-in here."""

from __future__ import annotations

import pytest
import torch

from membership.base.errors import DeviceLost, OutOfDeviceMemory, RankFailed

pytest.importorskip("triton")

from workers.model.cuda.backend import CudaBackend

pytestmark = pytest.mark.unit


class Stream:
    """Of a device that has failed with this; or works."""

    def __init__(self, failure: str) -> None:
        self.failure = failure

    def query(self) -> bool:
        if self.failure:
            raise RuntimeError(f"CUDA error: {self.failure}\nCompile with `TORCH_USE_CUDA_DSA` to ...")
        return False  # kernels still run: nobody waits for them


@pytest.mark.parametrize(
    ("failure", "error", "given_back", "lost"),
    [
        ("", ValueError("a broken request"), False, ""),
        ("", torch.OutOfMemoryError("CUDA out of memory"), True, ""),
        ("", RankFailed("CUDA's driver: CUDA_ERROR_OUT_OF_MEMORY"), True, ""),
        ("", RankFailed("CUDA's driver: CUDA_ERROR_INVALID_VALUE"), False, ""),
        ("", RankFailed("rank 1: layer 0, expert 2: CUDA out of memory"), False, ""),
        ("", RuntimeError("CUDA error: out of memory\nCompile with ..."), True, ""),
        ("", RuntimeError("Triton Error [CUDA]: out of memory"), True, ""),
        ("", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, ""),
        ("unspecified launch failure", RuntimeError("whatever came first"), False, "unspecified launch failure"),
        ("unspecified launch failure", torch.OutOfMemoryError("it cannot tell"), False, "unspecified launch failure"),
        # As CUDA words what may come with an Xid, whoever saw it first.
        ("no CUDA-capable device is detected", RuntimeError("whatever"), False, "no CUDA-capable device is detected"),
        (
            "uncorrectable ECC error encountered",
            RankFailed("CUDA's driver: CUDA_ERROR_ECC_UNCORRECTABLE"),
            False,
            "uncorrectable ECC error encountered",
        ),
        (
            "an illegal memory access was encountered",
            RuntimeError("Triton Error [CUDA]: an illegal memory access"),
            False,
            "an illegal memory access was encountered",
        ),
        (
            "the launch timed out and was terminated",
            ValueError("logits"),
            False,
            "the launch timed out and was terminated",
        ),
    ],
)
def test_only_an_error_that_stays_ends_the_rank(
    monkeypatch: pytest.MonkeyPatch, failure: str, error: Exception, given_back: bool, lost: str
) -> None:
    calls: list[str] = []
    backend = CudaBackend(torch.device("cpu"))
    backend.check(error)
    assert calls == [], "a CPU computes on"
    backend.device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(failure))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    if lost:
        with pytest.raises(DeviceLost, match=f"^cuda:1: CUDA error: {lost}$"):
            backend.check(error)
    else:
        assert backend.check(error) == given_back
    assert calls == ["empty_cache"] * given_back


def test_a_device_without_room_for_a_context_is_full_and_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    with pytest.raises(OutOfDeviceMemory, match="cuda:1"):
        CudaBackend(torch.device("cuda:1"))
    backend = CudaBackend(torch.device("cpu"))
    backend.device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("out of memory"))
    assert backend.check(RuntimeError("whatever"))
