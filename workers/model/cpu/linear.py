"""Makes the products and norms of a model exact: a row's bits do not depend on how many rows share the call.

Each matrix is measured once (`row_tiles.py`); its module is then called with agreeing row counts only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.calibrations import Calibrations
from workers.model.cpu.compute_threads import ComputeThreads, product_work
from workers.model.packing import is_packed, linear, repacked
from workers.model.row_tiles import CANDIDATES, REFERENCE, SAMPLE, RowTiles, calibrate, calibrate_product, cut

VECTOR = 64  # no narrower than two vectors of any type: what elementwise kernels handle at once
Forward = Callable[[Tensor], object]
AtOnce = Callable[[nn.Module, str, Calibrations], Forward | None]
"""A module by its name -> what computes any number of rows in one call, with the bits of 16; None: nothing does."""


def _row_outputs(output: object) -> Tensor:
    """All of a module's outputs for its rows side by side: routers return logits, weights and indices."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.reshape(-1, part.shape[-1]).double() for part in parts], dim=-1)


def _spaced(out: Tensor) -> Tensor:
    """A narrow result with gaps between its rows, so that what follows works row by row and not across rows: over
    contiguous memory, vectorised functions treat the elements that fill no whole vector differently."""
    width = out.shape[-1]
    wide = out.new_empty(*out.shape[:-1], VECTOR)
    return wide[..., :width].copy_(out)


def _tile(module: nn.Module, tiles: RowTiles, threads: ComputeThreads, at_once: Forward | None) -> None:
    """Make `module` compute in tiles. Steps are padded to common sizes, so mostly this only looks at the shape."""
    forward = module.forward
    known = frozenset(tiles.sizes)
    weights = sum(weight.numel() for weight in module.parameters(recurse=False))
    narrow = isinstance(module, nn.Linear) and module.out_features < VECTOR

    def tiled(hidden: Tensor) -> object:
        rows = hidden.shape[-2]
        if rows in known and not narrow:
            return forward(hidden)
        if at_once is not None and rows > tiles.sizes[-1]:
            return at_once(hidden)
        flat = hidden.reshape(rows, hidden.shape[-1])
        padded = tiles.padded(rows)
        if padded != rows:
            flat = torch.cat((flat, flat.new_zeros(padded - rows, flat.shape[-1])))
        pieces = cut(flat, tiles.sizes[-1])
        outputs = threads.map(forward, pieces, product_work(len(pieces[0]), weights))
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(column)[:rows] for column in zip(*outputs, strict=True))
        whole = (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[:rows].view(*hidden.shape[:-1], -1)
        return _spaced(whole) if narrow else whole

    module.forward = tiled


def _calibrate_module(module: nn.Module, name: str) -> RowTiles:
    """Row counts on which a projection, router or norm agrees with its 16-row results."""
    weight = module._parameters["weight"]
    if weight is None:
        raise ModelError(f"{name} has no weight")
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else torch.zeros_like(module.bias)
        if is_packed(weight):
            return calibrate_product(lambda rows, w: linear(rows, w, bias), weight, name, repacked)
        return calibrate_product(lambda rows, w: functional.linear(rows, w, bias), weight, name)
    # Norms compute in fp32 whatever they are given, and show it when given fp32.
    dtype = weight.dtype if weight.dim() == 2 else torch.float32
    sample = torch.randn(SAMPLE, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    tiles = calibrate(lambda rows: _row_outputs(module(rows)), sample, name)
    if weight.dim() < 2:
        return tiles
    product = calibrate_product(
        lambda rows, w: _row_outputs(functional_call(module, {"weight": w}, (rows,))), weight, name
    )
    return RowTiles(tuple(size for size in tiles.sizes if size in product.sizes))


def _sizes(module: nn.Module, name: str) -> tuple[int, ...]:
    return _calibrate_module(module, name).sizes


def _fits_vectors(model: nn.Module, size: int) -> bool:
    """Whether `size` rows fill whole vectors at every activation function of the dense MLPs."""
    gates = [m._modules.get("gate_proj") for m in model.modules()]
    return all(size * gate.out_features % VECTOR == 0 for gate in gates if isinstance(gate, nn.Linear))


def nothing_at_once(module: nn.Module, name: str, calibrations: Calibrations) -> None:
    """For devices whose library rounds by the number of rows."""


def make_invariant(
    model: nn.Module, calibrations: Calibrations, threads: ComputeThreads, at_once: AtOnce = nothing_at_once
) -> RowTiles:
    """Calibrate and tile every module of `model` that owns a matrix; returns the row counts for whole steps.

    Small steps must suit every module; large ones only what is not cut into tiles: norms and activations. More rows
    than the largest tile has go to what `at_once` gives for the module, if it does.
    """
    done: dict[tuple[object, ...], RowTiles] = {}
    step_sizes = {size for size in CANDIDATES if _fits_vectors(model, size)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or isinstance(module, nn.Embedding):
            continue
        key: tuple[object, ...] = (
            type(module),
            tuple(weight.shape),
            weight.dtype,
            module._parameters.get("bias") is not None,
        )
        if is_packed(weight):
            key = (*key, "packed")
        if key not in done:
            measure = partial(_sizes, module, name)
            done[key] = RowTiles(calibrations.of(" ".join(str(part) for part in key), measure))
        agreed = set(done[key].sizes)
        if weight.dim() == 2:
            _tile(module, done[key], threads, at_once(module, name, calibrations))
            narrow = weight.shape[0] < VECTOR  # cheap enough to be padded alone
            agreed |= {size for size in CANDIDATES if size > REFERENCE or narrow}
        step_sizes &= agreed
    if REFERENCE not in step_sizes:
        raise ModelError("a width of this model does not fill vectors", hint="--exactness stock serves it")
    return RowTiles(tuple(sorted(step_sizes)))
