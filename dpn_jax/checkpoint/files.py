"""Files of named tensors: safetensors and PyTorch's, read lazily; safetensors, written atomically.

What the names mean is for `dpn_jax.checkpoint.names`.
"""

import contextlib
import importlib
import json
import os
import pickle
import secrets
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from dpn_jax.checkpoint.names import Shape
from dpn_jax.errors import CheckpointError, reason

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
_DTYPE_ORDER = list(DTYPES)
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the average first
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


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


def read_tensors(path: Path) -> TensorFile:
    """Opens a checkpoint; the format is told from the content, not from the name.

    Args:
      path: a safetensors file, or a `.pth`/`.bin` file (which needs torch, and is read with
        `torch.load(weights_only=True)` only: no code in it runs).

    Returns:
      The tensors, `module.` and `_orig_mod.` stripped from their names.

    Raises:
      CheckpointError: the file is missing, damaged, malicious or of another kind.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
        if path.suffix == ".json":
            raise CheckpointError(
                f"{path}: holds no weights, and sharded checkpoints (.index.json) are not supported; "
                "pass all weights as one .safetensors or .pth file"
            )
        with path.open("rb") as file:
            start = file.read(9)
        # safetensors begin with 8 bytes of length, which may look like anything, and a brace
        is_pickle = start.startswith((b"\x80", b"PK")) and not start.endswith(b"{")
        return _strip_prefixes(_read_torch(path) if is_pickle else _read_safetensors(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # the library checks the header and every offset
            metadata = file.metadata()
        mapped = np.memmap(path, mode="r", dtype=np.uint8)
        start = 8 + int(mapped[:8].view("<u8")[0])
        header = json.loads(bytes(mapped[8:start]), object_pairs_hook=_refuse_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _lazy_mapped(mapped, start, **fields) for name, fields in header.items()}
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({reason(error)})") from error
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


def _read_torch(path: Path) -> TensorFile:
    try:
        torch = importlib.import_module("torch")  # only here, only when asked for
    except ImportError as error:
        raise CheckpointError(f'{path}: PyTorch files need torch; pip install "dpn-jax[convert]"') from error
    try:
        mmap = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch would go by that name
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an error says it all
                content = torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: refused: more than tensors in it, or damaged ({reason(error)})") from error
        notes = []
        for _ in range(2):  # a pickle can contain itself
            wrappers = _WRAPPERS if isinstance(content, Mapping) else ()
            if (key := next((key for key in wrappers if content.get(key) is not None), None)) is None:
                break
            content = content[key]
            notes.append(f"took the tensors under {key!r}")
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path}: holds {type(content).__name__}, not tensors by name")
        if strange := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
            raise CheckpointError(f"{path}: {strange[0]!r} is not a tensor")
        tensors = {str(name): _lazy_torch(path, str(name), value) for name, value in content.items()}
    except CheckpointError:
        raise
    except Exception as error:  # torch's readers raise whatever a damaged file makes them stumble over
        raise CheckpointError(f"{path}: not a readable PyTorch file ({reason(error)})") from error
    return TensorFile(path, tensors, {}, tuple(notes))


def _lazy_torch(path: Path, name: str, tensor: object) -> LazyTensor:
    code = str(tensor.dtype).removeprefix("torch.")
    dtypes = {dtype.name: dtype for dtype in DTYPES}
    if code not in dtypes:
        raise CheckpointError(f"{path}: {name} has dtype {code}; expected one of {', '.join(dtypes)}")
    tensor = tensor.detach()
    if code == "bfloat16":  # numpy() does not know it: hand over the bits
        array = tensor.view(importlib.import_module("torch").int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()  # a view of the mapped file
    return LazyTensor(array.shape, array.dtype, lambda: array)


def _strip_prefixes(file: TensorFile) -> TensorFile:
    tensors, notes = file.tensors, list(file.notes)
    while prefix := next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"stripped {prefix!r} from every name")
    return file._replace(tensors=tensors, notes=tuple(notes))


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Writes a safetensors file, atomically and a tensor at a time, in the library's layout.

    The library's own writer wants every tensor in memory at once, and orders the metadata at random, so that no two
    files are alike. Here a conversion needs little more memory than its source has, and the same model gives the same
    bytes.

    Args:
      path: the file to write.
      tensors: what to write.
      metadata: free text for the header.
      overwrite: replace an existing file; it stays whole until the new one is.

    Raises:
      CheckpointError: the file exists and `overwrite` is not set, or it cannot be written.
    """
    try:
        if not overwrite and path.exists():
            raise CheckpointError(f"{path}: exists already; overwrite it with --force (overwrite=True)")
        write_atomically(path, _serialized(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({reason(error)})") from error


def _serialized(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    order = sorted(tensors, key=lambda name: (_DTYPE_ORDER.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        shape, dtype = tensors[name][:2]
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        array = np.ascontiguousarray(tensors[name].read())
        yield array.reshape(-1).view(np.uint8).data


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file so that a reader, now or after a crash, finds the old one or the new one, never a part.

    Args:
      path: the file to write or replace.
      chunks: its content, piece by piece.

    Raises:
      OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
