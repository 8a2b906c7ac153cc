"""Files of named tensors, read lazily: what such a file holds; safetensors. PyTorch's: `read`.

What the names mean is for `dpn_jax.checkpoint.names`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from dpn_jax.checkpoint.names import Shape
from dpn_jax.errors import CheckpointError, reason, shown

# safetensors' names, in the order in which its own writer sorts tensors (widest first, so that all are aligned)
DTYPES: dict[np.dtype, str] = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.uint64, "U64"),
        (np.int64, "I64"),
        (np.float64, "F64"),
        (np.complex64, "C64"),
        (np.float32, "F32"),
        (np.uint32, "U32"),
        (np.int32, "I32"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.float16, "F16"),
        (np.uint16, "U16"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.bool_, "BOOL"),
    )
}
FORMAT = "dpn_jax"
"""What the metadata of our own files says under 'format'; a file in timm's layout has ours under this name."""


class LazyTensor(NamedTuple):
    """A tensor that is only read when asked for."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file_name: str = ""
    """What the file calls the tensor, where that differs from the name it is kept under."""


class TensorFile(NamedTuple):
    """The content of a checkpoint's file."""

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    """safetensors' free-text metadata."""
    notes: tuple[str, ...]
    """What was unwrapped on the way, one sentence each."""

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's shape by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_safetensors(path: Path) -> TensorFile:
    """Opens a safetensors file; its tensors are read from the mapped file, one by one.

    Raises:
      CheckpointError: it is damaged, or no safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # the library checks the header and every offset
            metadata = file.metadata()
        mapped = np.memmap(path, mode="r", dtype=np.uint8)
        start = 8 + int(mapped[:8].view("<u8")[0])
        header = json.loads(bytes(mapped[8:start]), object_pairs_hook=_refuse_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _lazy_mapped(mapped, start, **fields) for name, fields in header.items()}
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)}: not a readable safetensors file ({reason(error)})") from error
    return TensorFile(path, tensors, metadata or {}, ())


def _lazy_mapped(mapped: np.memmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> LazyTensor:
    known = {code: dtype for dtype, code in DTYPES.items()}
    if dtype not in known:
        raise ValueError(f"a tensor has dtype {dtype}; expected one of {', '.join(known)}")
    offset = start + data_offsets[0]
    return LazyTensor(tuple(shape), known[dtype], lambda: np.ndarray(shape, known[dtype], buffer=mapped, offset=offset))


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The library keeps the last of two tensors with one name; which of them is meant cannot be known."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header has {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields
