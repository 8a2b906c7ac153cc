"""From a model to a file, and from file to file."""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.checkpoint.files import DTYPES, LazyTensor, write_tensors
from dpn_jax.checkpoint.load import dotted, saved_values
from dpn_jax.checkpoint.names import Entry, name_table, to_timm
from dpn_jax.checkpoint.open import FORMAT, Checkpoint, cast, open_checkpoint
from dpn_jax.config import DPNConfig
from dpn_jax.errors import CheckpointError, reason
from dpn_jax.pretrained import Provenance
from dpn_jax.stock import changes


def save(model: nnx.Module, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model into one safetensors file, with its architecture and provenance, atomically.

    Args:
      model: a `DPN`, stock or changed; its parameters keep their dtype. Of a changed one the file also says what was
        changed, and `load(path, into=model)` restores it.
      path: the file, usually `*.safetensors`.
      overwrite: replace an existing file.

    Raises:
      CheckpointError: the file exists and `overwrite` is not set, or cannot be written.
      ValueError: the model has no config, is abstract (has no values), or has a value that a file cannot hold.
    """
    if not isinstance(getattr(model, "config", None), DPNConfig):
        raise ValueError(f"only a DPN can be saved, got a {type(model).__name__}")
    tensors = {}
    for path_in_model, value in saved_values(model).items():
        name = dotted(path_in_model)
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"the model is abstract: {name} has no value to save")
        if value.dtype not in DTYPES:
            known = ", ".join(dtype.name for dtype in DTYPES)
            raise ValueError(f"{name} is {value.dtype}, which a file cannot hold; expected one of {known}")
        tensors[name] = LazyTensor(value.shape, value.dtype, functools.partial(np.asarray, value))
    metadata = _metadata(model.config, model.provenance)
    if changed := changes(model):
        metadata["changes"] = json.dumps(changed)
    write_tensors(Path(path), tensors, metadata, overwrite=overwrite)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["flax", "timm"] | None = None,
    model: str | DPNConfig | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Rewrites a checkpoint in the other layout, a tensor at a time; no model is built, and torch is not needed.

    timm -> Flax -> timm gives the same bytes, since values and dtypes stay as they are.

    Args:
      source: as for `from_pretrained`.
      destination: a `.safetensors` file.
      to: the layout to write; defaults to the other one than the source's.
      model, revision, allow_nonfinite: as for `from_pretrained`.
      dtype: dtype to cast parameters and statistics to; defaults to the source's.
      overwrite: replace an existing file.

    Returns:
      The checkpoint that was read.

    Raises:
      CheckpointError: the source cannot be read, does not fit or is a changed model's, or the destination exists or is
        the source.
      ValueError: an unknown name, or a destination that is not named `.safetensors`.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"{destination}: the name must end in .safetensors, which timm and dpn_jax both read")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point one, got {jnp.dtype(dtype)}")
    checkpoint = open_checkpoint(source, model=model, revision=revision)
    to = to or ("flax" if checkpoint.is_timm else "timm")
    checkpoint.require_stock("timm has no such layer; " if to == "timm" else "")
    try:
        if destination.exists() and checkpoint.path.samefile(destination):
            raise CheckpointError(f"{destination}: is the source itself; name another file")
    except OSError as error:
        raise CheckpointError(f"{destination}: {reason(error)}") from error
    checkpoint.verify_download()
    entries = {entry.flax: entry for entry in name_table(checkpoint.config) if entry.flax in checkpoint.tensors}
    dtypes = {
        name: checkpoint.tensors[name].dtype if dtype is None or entry.is_counter else np.dtype(dtype)
        for name, entry in entries.items()
    }
    if not allow_nonfinite:
        for _ in checkpoint.read(dtypes):  # all of it before anything is written, to list every tensor at fault
            pass
    tensors = {
        entry.timm if to == "timm" else name: _converted(entry, checkpoint.tensors[name], dtypes[name], to)
        for name, entry in entries.items()
    }
    metadata = {"format": "pt"} if to == "timm" else _metadata(checkpoint.config, checkpoint.provenance)
    write_tensors(destination, tensors, metadata, overwrite=overwrite)
    return checkpoint


def _converted(entry: Entry, tensor: LazyTensor, dtype: np.dtype, to: Literal["flax", "timm"]) -> LazyTensor:
    if to == "flax":
        return LazyTensor(entry.flax_shape, dtype, lambda: cast(tensor.read(), dtype))
    dtype = np.dtype(np.int64) if entry.is_counter else dtype
    return LazyTensor(entry.timm_shape, dtype, lambda: to_timm(entry, cast(tensor.read(), dtype)))


def _metadata(config: DPNConfig, provenance: Provenance) -> dict[str, str]:
    fields = provenance._asdict()
    fields["preprocessing"] = provenance.preprocessing and dataclasses.asdict(provenance.preprocessing)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "safetensors")}
    return {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "provenance": json.dumps(fields),
        "versions": json.dumps(versions),
    }
