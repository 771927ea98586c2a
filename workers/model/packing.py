"""Matrices as oneDNN multiplies with them, in memory that we give, so that all ranks of a host can share them.

Of a plain bfloat16 matrix oneDNN makes such a copy at each call, which takes longer than a product of few rows. torch
keeps packed ones, but in private memory. Its interface for compiled models, whose constants lie in one block, makes
such a tensor over any memory: with that, a matrix is packed in place once per host. Whether all of it works is tried
first; where it does not, matrices stay plain. Products have the same bits either way (`row_tiles.py` measures them).

A packed matrix comes with oneDNN's own description of it, which it believes unseen: a wrong one reads memory that is
not ours. So only that one is taken which this process makes for such a matrix itself (`layout`). It
packs block by block of rows, so no second copy of a large matrix is made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from membership.base.errors import ModelError

log = structlog.get_logger(__name__)
_PACKED = cast("torch.layout", torch._mkldnn)  # type: ignore[attr-defined]
_ROWS = 64  # of the smallest block: what oneDNN packs together
_MOST_ROWS, _MOST_BYTES = 1024, 4 << 20  # of a block: each has a call of 0.1 ms, and a second copy meanwhile
Pack = Callable[[Tensor], bytes]


def pack(matrix: Tensor) -> bytes:
    """Pack a contiguous matrix [N, K] in place; how, for `packed`. Empty: it stays plain."""
    return _pack(matrix) if available() else b""


def takes(dtype: torch.dtype, shape: tuple[int, ...], packing: bytes) -> bool:
    """Whether this process has a use for matrices of that shape that are packed so, or plain."""
    return not packing or (available() and dtype == torch.bfloat16 and layout(shape) == packing)


def packed(room: Tensor, packing: bytes) -> Tensor:
    """The packed matrix that is in `room`, a tensor of its plain shape. ModelError: it is not packed as we do."""
    if not (packing and takes(room.dtype, tuple(room.shape), packing)):
        raise ModelError("these weights are packed for another torch or processor", hint="load them again")
    return _packed(room, packing)


def plain_blocks(room: Tensor) -> Iterator[Tensor]:
    """The rows of the packed matrix that is in `room` as they were before, block after block."""
    for block in torch.split(room, _block(tuple(room.shape))):
        yield plain(packed(block, layout(tuple(block.shape))))


def _packed(room: Tensor, packing: bytes) -> Tensor:
    library, sizes = _library(), (ctypes.c_int64 * 2)
    made = ctypes.c_void_p()
    code = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(room.data_ptr()), ctypes.c_int64(2), sizes(*room.shape), sizes(*room.stride()),
        ctypes.c_int64(0), library.aoti_torch_dtype_bfloat16(), library.aoti_torch_device_type_cpu(), 0,
        ctypes.byref(made), library.aoti_torch_layout__mkldnn(), packing, ctypes.c_int64(len(packing)),
    )  # fmt: skip
    if code:
        raise ModelError("torch does not take these packed weights", hint="another version of it has packed them")
    # Its sibling for one tensor takes no handle over, so that the tensor would never end.
    (tensor,) = cast("Any", torch._C._aoti).alloc_tensors_by_stealing_from_void_ptrs([_capsule(made.value, None, None)])
    tensor.room = room  # which ends with it
    return cast("Tensor", tensor)


def parameter(weights: Tensor) -> nn.Parameter:
    """Weights as a module has them."""
    made: Any = nn.Parameter(weights, requires_grad=False)
    if is_packed(weights):
        made.room = cast("Any", weights).room
    return cast("nn.Parameter", made)


def is_packed(matrix: Tensor) -> bool:
    """Whether it came from `packed`."""
    return matrix.layout is _PACKED


def plain(matrix: Tensor) -> Tensor:
    """[N, K] as it was before it was packed."""
    return matrix.to_dense() if is_packed(matrix) else matrix


def product(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """[R, K] times a right-hand side, plain [K, N] or packed [N, K]."""
    if not is_packed(weights):
        return torch.mm(rows, weights, out=out)
    found = linear(rows, weights)
    return found if out is None else out.copy_(found)


def linear(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., K] times packed weights [N, K]."""
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise.default(rows, weights, bias, "none", [], ""))


def repacked(matrix: Tensor) -> Tensor:
    """A plain matrix packed in its own memory."""
    return packed(matrix, _pack(matrix))


def stays_plain(_: Tensor) -> bytes:
    """What `pack` is where nothing is packed."""
    return b""


def use_packed(model: nn.Module) -> None:
    """Have all of its linear modules whose weights are packed multiply with these."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_packed(module.weight):
            module.forward = partial(linear, weights=module.weight, bias=module.bias)  # type: ignore[method-assign]


@cache
def available() -> bool:
    """Whether a product with a packed matrix in memory of ours has the bits of a plain one."""
    generator = torch.Generator().manual_seed(1)
    matrix, rows = (torch.randn(n, 128, generator=generator).to(torch.bfloat16) for n in (2 * _MOST_ROWS, 4))
    try:
        with torch.inference_mode():
            wanted, packing = torch.mm(rows, matrix.t()), _pack(matrix)
            return bool(packing) and torch.equal(linear(rows, _packed(matrix, packing)), wanted)
    except (AttributeError, RuntimeError, OSError, ModelError) as error:  # another torch, or one without oneDNN
        log.info("weights_stay_plain", reason=str(error))
        return False


def _pack(matrix: Tensor) -> bytes:
    packing = layout(tuple(matrix.shape)) if matrix.dtype == torch.bfloat16 else b""
    if packing:
        for block in torch.split(matrix, _block(tuple(matrix.shape))):
            made = torch.ops.mkldnn._reorder_linear_weight(block, None)
            ctypes.memmove(block.data_ptr(), torch.ops.mkldnn.data_ptr(made), block.nbytes)
    return packing


def _block(shape: tuple[int, ...]) -> int:
    """Rows of a block of such a bfloat16 matrix: the most that divide it; 0 if none do."""
    rows, columns = shape
    most = max(_ROWS, min(_MOST_ROWS, _MOST_BYTES // (2 * columns)))
    return max((size for size in range(_ROWS, most + 1, _ROWS) if rows % size == 0), default=0)


@cache
def layout(shape: tuple[int, ...]) -> bytes:
    """How oneDNN describes a packed bfloat16 matrix of that shape, all of whose blocks lie behind each other.

    That of a block, with another number of rows: where nothing but this number differs between one block and two, no
    element's place in its block depends on it. Empty: it would be padded or lie otherwise, so it stays plain.
    """
    if len(shape) != 2 or not all(shape) or not (block := _block(shape)):
        return b""
    one, two = (_description(count * block, shape[1]) for count in (1, 2))
    if not one or len(one) != len(two):
        return b""
    end = len(one) // 8 * 8
    numbers, doubled = (np.frombuffer(each[:end], np.int64) for each in (one, two))
    differ = numbers != doubled
    if one[end:] != two[end:] or (numbers[differ] != block).any() or (doubled[differ] != 2 * block).any():
        return b""
    return np.where(differ, shape[0], numbers).tobytes() + one[end:]


def _description(rows: int, columns: int) -> bytes:
    ops: Any = torch.ops.mkldnn
    matrix = torch.zeros(rows, columns, dtype=torch.bfloat16)
    made = ops._reorder_linear_weight(matrix, None)
    return bytes(ops._get_mkldnn_serialized_md(made).tolist()) if ops._nbytes(made) == matrix.nbytes else b""


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
