"""Files of named tensors: safetensors, one file or sharded, and PyTorch's own; read lazily, written atomically.

What the names mean is for `dpn_jax.checkpoint.names`.
"""

import contextlib
import hashlib
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
_DTYPES: dict[np.dtype, str] = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.int64, "I64"),
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.int32, "I32"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.float16, "F16"),
    )
}
_DTYPE_ORDER = list(_DTYPES)
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the average first
_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


class LazyTensor(NamedTuple):
    """A tensor that is only read when asked for."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class FileStamp(NamedTuple):
    """A file as it was at one moment."""

    path: str
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""

    @classmethod
    def of(cls, path: str | Path) -> "FileStamp":
        """The file as it is now."""
        status = Path(path).stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)


class TensorFile(Mapping[str, LazyTensor]):
    """The tensors of a checkpoint by name.

    Attributes:
      paths: the files that hold them.
      metadata: safetensors' free-text metadata.
      notes: what was unwrapped on the way, one sentence each.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        *,
        paths: tuple[Path, ...],
        metadata: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._tensors = dict(tensors)
        self.paths = paths
        self.metadata = dict(metadata or {})
        self.notes = notes

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every tensor's shape by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def stamps(self) -> tuple[FileStamp, ...]:
        """What tells whether the files have changed since."""
        return tuple(FileStamp.of(path) for path in self.paths)


def read_tensors(path: Path) -> TensorFile:
    """Opens a checkpoint; the format is told from the content, not from the name.

    Args:
      path: a safetensors file, the `.index.json` of a sharded one, or a `.pth`/`.bin` file (which needs torch, and is
        read with `torch.load(weights_only=True)` only: no code in it runs).

    Returns:
      The tensors, `module.` and `_orig_mod.` stripped from their names.

    Raises:
      CheckpointError: the file is missing, damaged, malicious or of another kind.
    """
    try:
        return _without_prefixes(_read_sharded(path) if path.name.endswith(".json") else _read_file(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from error


def _read_file(path: Path) -> TensorFile:
    _check_is_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors begin with 8 bytes of length, which may look like anything, and a brace
    is_pickle = start.startswith((b"\x80", b"PK")) and not start.endswith(b"{")
    return _read_torch(path) if is_pickle else _read_safetensors(path)


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")


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
    return TensorFile(tensors, paths=(path,), metadata=metadata)


def _lazy_mapped(mapped: np.memmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> LazyTensor:
    known = {code: dtype for dtype, code in _DTYPES.items()}
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


def _read_sharded(path: Path) -> TensorFile:
    _check_is_file(path)
    try:
        shards = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(shards.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of sharded safetensors ({reason(error)})") from error
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        for tensor, value in _read_file(path.with_name(name)).items():
            if shards.get(tensor) != name:
                raise CheckpointError(f"{path}: {name} holds {tensor!r}, which the index places elsewhere")
            tensors[tensor] = value
    if absent := sorted(shards.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: {shards[absent[0]]} lacks {absent[0]!r}, which the index promises")
    return TensorFile(tensors, paths=tuple(path.with_name(name) for name in names))


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
    return TensorFile(tensors, paths=(path,), notes=tuple(notes))


def _lazy_torch(path: Path, name: str, tensor: object) -> LazyTensor:
    code = str(tensor.dtype).removeprefix("torch.")
    dtypes = {dtype.name: dtype for dtype in _DTYPES}
    if code not in dtypes:
        raise CheckpointError(f"{path}: {name} has dtype {code}; expected one of {', '.join(dtypes)}")
    tensor = tensor.detach()
    if code == "bfloat16":  # numpy() does not know it: hand over the bits
        array = tensor.view(importlib.import_module("torch").int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()  # a view of the mapped file
    return LazyTensor(array.shape, array.dtype, lambda: array)


def _without_prefixes(file: TensorFile) -> TensorFile:
    tensors, notes = dict(file), list(file.notes)
    while prefix := next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"stripped {prefix!r} from every name")
    return TensorFile(tensors, paths=file.paths, metadata=file.metadata, notes=tuple(notes))


def sha256(paths: Iterable[str | Path]) -> str:
    """SHA-256 of a file, or of the files of a sharded checkpoint one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Writes one safetensors file, atomically and a tensor at a time, byte for byte as the library would.

    The library's own writer wants every tensor in memory at once; here a conversion needs no more than its source.

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
        shape, dtype, _ = tensors[name]
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
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
