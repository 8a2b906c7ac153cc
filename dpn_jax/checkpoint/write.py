"""Files written atomically: safetensors, and any other; where they may be written."""

import contextlib
import errno
import json
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from dpn_jax.checkpoint.files import DTYPES, LazyTensor
from dpn_jax.errors import CheckpointError, reason, shown
from dpn_jax.paths import local_path

_DTYPE_ORDER = list(DTYPES)


def writable_path(path: str | os.PathLike, *, overwrite: bool, error: type[ValueError] = CheckpointError) -> Path:
    """Checks, before anything is computed, that a file may be written.

    Args:
      path: the file to write.
      overwrite: whether it may exist.
      error: the exception to raise.

    Returns:
      The path.

    Raises:
      CheckpointError, or `error`: it is a URL, a folder or a special file, or it exists and `overwrite` is not set.
    """
    path = local_path(path, error=error)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{shown(path)}: cannot be written (not a regular file); name another file")
        if path.exists() and not overwrite:
            raise error(f"{shown(path)}: exists already; overwrite it with --force (overwrite=True)")
    except OSError as problem:
        raise error(f"{shown(path)}: cannot be written ({reason(problem)})") from problem
    return path


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
      CheckpointError: as `writable_path`, or the file cannot be written.
    """
    path = writable_path(path, overwrite=overwrite)
    try:
        write_atomically(path, _serialized(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be written ({reason(error)})") from error


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
      path: the file to write or replace. Of a symbolic link, the file that it points to.
      chunks: its content, piece by piece.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))  # Path.resolve raises on a circle of links, but not since Python 3.13
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    temporary = path.with_name(f".dpn_jax-{secrets.token_hex(8)}.tmp")  # the longest legal name has no room for more
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
    # The rename itself should reach the disk too, where folders can be opened and synced: not on Windows, nor on CIFS
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
