"""How messages become bytes: pickle for this host's own queues only, msgpack of a fixed schema for everything else.

Pickle's protocol 5 hands out the memory of numpy arrays and torch tensors as buffers, which the queue carries as they
are: arrays are never copied into a pickle, and large ones are read in place (read-only) by all readers.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from membership.base.errors import QueueError

OUT_OF_BAND_MIN = 512  # bytes; smaller arrays cost less inside the pickle
ARRAY_KINDS = "biufc"  # numpy types that their `dtype.str` names wholly
ARRAY_CODE, TENSOR_CODE = 240, 241  # in pickles of this module's functions; of copyreg's range for private use


class Codec(Protocol):
    """Both ends of a queue must use the same. `name` travels in the handle and is compared."""

    name: str
    raw_bytes: bool  # whether a `bytes` message goes as it is, without encode and decode

    def encode(self, message: Any) -> tuple[bytes, Sequence[memoryview]]:
        """The message, and the raw buffers it refers to."""

    def decode(self, data: bytes | memoryview, buffers: Sequence[memoryview]) -> Any:
        """Back again. Buffers may be in shared memory; a view of them keeps them alive."""


class PickleCodec:
    """Any picklable object, between processes of one trust on one host."""

    name = "pickle"
    raw_bytes = True

    def encode(self, message: Any) -> tuple[bytes, Sequence[memoryview]]:
        """See Codec."""
        if _awaited:
            _look_for_libraries()
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        _Pickler(file, 5, buffer_callback=buffers.append).dump(message)
        return file.getvalue(), [buffer.raw() for buffer in buffers] if buffers else ()

    def decode(self, data: bytes | memoryview, buffers: Sequence[memoryview]) -> Any:
        """See Codec."""
        return pickle.loads(data, buffers=buffers)  # noqa: S301 - this host's own queue


class MsgpackCodec:
    """Values of one type (a msgspec struct, a union of them): the only codec that may cross the network."""

    name = "msgpack"
    raw_bytes = False

    def __init__(self, type: Any = Any) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(type).decode

    def encode(self, message: Any) -> tuple[bytes, Sequence[memoryview]]:
        """See Codec."""
        return self._encode(message), ()

    def decode(self, data: bytes | memoryview, buffers: Sequence[memoryview]) -> Any:
        """See Codec. What does not fit the type is a QueueError."""
        try:
            return self._decode(data)
        except msgspec.MsgspecError as error:
            raise QueueError(f"message does not fit the queue's type: {error}") from error


_reducers = dict(copyreg.dispatch_table)


class _Pickler(pickle.Pickler):
    dispatch_table = _reducers


_awaited = {"numpy": "ndarray", "torch": "Tensor"}


def _look_for_libraries() -> None:
    """Arrays and tensors get our reducers as soon as their libraries are there; neither is imported for it."""
    for library, name in list(_awaited.items()):
        kind = getattr(sys.modules.get(library), name, None)
        if kind is not None:
            del _awaited[library]
            reducer = _reduce_array if library == "numpy" else _reduce_tensor
            _reducers.update({**copyreg.dispatch_table, kind: reducer})


def _buffer(array: Any) -> Any:
    return pickle.PickleBuffer(array) if array.nbytes >= OUT_OF_BAND_MIN else array.tobytes()


def _reduce_array(array: Any) -> Any:
    if array.dtype.kind not in ARRAY_KINDS or not array.flags.c_contiguous:
        return array.__reduce_ex__(5)
    return make_array, (array.shape, array.dtype.str, _buffer(array))


def make_array(shape: tuple[int, ...], dtype: str, buffer: Any) -> Any:
    """The array again, where its bytes lie."""
    import numpy as np

    return np.ndarray(shape, dtype, buffer)


def _reduce_tensor(tensor: Any) -> Any:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.requires_grad or not tensor.numel():
        return tensor.__reduce_ex__(5)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return make_tensor, (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), _buffer(raw))


def make_tensor(shape: tuple[int, ...], dtype: str, buffer: Any) -> Any:
    """The tensor again, where its bytes lie. Torch has no read-only tensors, and warns that it must not be written."""
    import torch

    warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
    return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).reshape(shape)


copyreg.add_extension(__name__, "make_array", ARRAY_CODE)
copyreg.add_extension(__name__, "make_tensor", TENSOR_CODE)
