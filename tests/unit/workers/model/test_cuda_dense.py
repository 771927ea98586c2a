"""A long piece's dense products in one launch each, in Triton's interpreter: only where they round as torch's do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from workers.model import row_tiles
from workers.model.calibrations import Calibrations
from workers.model.cpu import linear

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from workers.model.cuda import dense
from workers.model.cuda.backend import CudaBackend

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: test_backend.py asks them"),
]


def whole_numbers(*shape: int, seed: int = 6) -> Tensor:
    """Whose sums are exact in any order."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).half()


class Router(nn.Linear):
    """A projection by its class, which gives more than its product."""


class Projected(nn.Module):
    """A projection, and a router of the usual kind; 72 columns and 80 rows of a matrix fill no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(72, 80, bias=False, dtype=torch.float16)
        config = MixtralConfig(hidden_size=72, num_local_experts=64, num_experts_per_tok=3)
        self.router = MixtralTopKRouter(config).half()
        with torch.no_grad():
            self.proj.weight.copy_(whole_numbers(80, 72))
            self.router.weight.copy_(whole_numbers(64, 72, seed=7))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return self.proj(hidden), *self.router(hidden)


@torch.inference_mode()
def test_a_long_piece_is_one_launch_per_product_where_it_rounds_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (dense, row_tiles, linear):  # few sizes: the interpreter is slow
        monkeypatch.setattr(module, "CANDIDATES", (16, 32))
        monkeypatch.setattr(module, "SAMPLE", 32, raising=False)
    launched: list[int] = []

    def counted(rows: Tensor, weight: Tensor) -> Tensor:
        launched.append(len(rows))
        return product_at_once(rows, weight)

    product_at_once = dense.product
    monkeypatch.setattr(dense, "product", counted)
    backend = CudaBackend(torch.device("cpu"))
    rows, answers = whole_numbers(1, 40, 72), []
    for agrees in (True, False):
        model = Projected()
        plain = model(rows)
        backend.fuse(model)
        monkeypatch.setattr(dense, "_agreeing", lambda weight, name, ok=agrees: dense.CANDIDATES if ok else (16,))
        backend.make_invariant(model, Calibrations())
        launched.clear()
        answers.append(model(rows))
        assert launched == ([40, 40] if agrees else [])
        assert model(rows[:, :32])[0].shape == (1, 32, 80)
        assert launched == ([40, 40] if agrees else [])
        assert torch.equal(answers[-1][0], plain[0])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


@pytest.mark.parametrize("pieces", [32, 16])
def test_tiles_of_a_long_piece_that_round_otherwise_or_do_not_fit_are_not_used(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter our product may stand for torch's, which sums in another order there."""
    for module in (dense, row_tiles):
        monkeypatch.setattr(module, "CANDIDATES", (16, 64))
    reference, layer = dense.HIGH, nn.Linear(128, 64, bias=False)
    used: list[bool] = []

    def torch_like(rows: Tensor, weight: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(dense, "HIGH", reference)
            return dense.product(rows, weight)

    monkeypatch.setattr(dense.functional, "linear", torch_like)
    monkeypatch.setattr(dense, "HIGH", replace(reference, piece_bytes=pieces * 4))
    used.append(dense.at_once(layer, "a test", Calibrations()) is not None)

    def too_large(rows: Tensor, weight: Tensor) -> Tensor:
        raise OutOfResources(98304, 65536, "shared memory")

    monkeypatch.setattr(dense, "product", too_large)
    used.append(dense.at_once(layer, "a test", Calibrations()) is not None)
    assert used == [pieces == 32, False]


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_long_piece_cannot_be_launched_for_stays_in_tiles(bias: bool) -> None:
    layer = nn.Linear(32, 64 if bias else 8, bias=bias)
    assert dense.at_once(layer, "a test", Calibrations()) is None
    assert dense.at_once(nn.Linear(32, 64, dtype=torch.float64, bias=False), "a test", Calibrations()) is None
    assert dense.at_once(Router(32, 64, bias=False), "a test", Calibrations()) is None
