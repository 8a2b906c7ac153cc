"""From a model to a file, and from file to file."""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from dpn_jax.checkpoint.files import DTYPES, FORMAT, LazyTensor
from dpn_jax.checkpoint.load import dotted, saved_values
from dpn_jax.checkpoint.names import Entry, infer_config, name_table, to_timm
from dpn_jax.checkpoint.open import Checkpoint, cast, check_dtypes, open_checkpoint, read_metadata
from dpn_jax.checkpoint.write import writable_path, write_tensors
from dpn_jax.config import DPNConfig
from dpn_jax.errors import CheckpointError, reason, shown
from dpn_jax.operations import check_arguments
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
      CheckpointError: the file exists and `overwrite` is not set, or cannot be written (a URL, a folder, a special
        file); or a tensor of a stock model is not floating-point.
      ValueError: the model has no config, is abstract (has no values), or has a value or provenance that a file cannot
        hold.
    """
    path = writable_path(path, overwrite=overwrite)
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
    else:
        check_dtypes(tensors)
    write_tensors(path, tensors, metadata, overwrite=overwrite)


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

    timm -> Flax -> timm gives the same tensors, since values and dtypes stay as they are, and the same bytes where
    nothing else is known. The preprocessing, the class names and what the tensors do not tell of the architecture go
    into the metadata in timm's layout too, where timm passes over them and dpn_jax reads them.

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
      CheckpointError: the source cannot be read, does not fit or is a changed model's, or the destination exists, is
        the source, or cannot be written.
      ValueError: an unknown name, or a destination that is not named `.safetensors`.
    """
    path = writable_path(destination, overwrite=overwrite)
    if path.suffix != ".safetensors":
        raise ValueError(f"{shown(path)}: the name must end in .safetensors, which timm and dpn_jax both read")
    if dtype is not None:
        check_arguments(rngs=None, dtype=dtype)
    checkpoint = open_checkpoint(source, model=model, revision=revision)
    to = to or ("flax" if checkpoint.is_timm else "timm")
    checkpoint.require_stock("timm has no such layer; " if to == "timm" else "")
    if path.exists() and checkpoint.path.samefile(path):
        raise CheckpointError(f"{shown(path)}: is the source itself; name another file")
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
    metadata = _metadata(checkpoint.config, checkpoint.provenance)
    if to == "timm":  # which reads the tensors alone
        metadata = {"format": "pt"} | ({FORMAT: json.dumps(metadata)} if _is_told(checkpoint) else {})
    write_tensors(path, tensors, metadata, overwrite=overwrite)
    return checkpoint


def _converted(entry: Entry, tensor: LazyTensor, dtype: np.dtype, to: Literal["flax", "timm"]) -> LazyTensor:
    if to == "flax":
        return LazyTensor(entry.flax_shape, dtype, lambda: cast(tensor.read(), dtype))
    dtype = np.dtype(np.int64) if entry.is_counter else dtype
    return LazyTensor(entry.timm_shape, dtype, lambda: to_timm(entry, cast(tensor.read(), dtype)))


def _is_told(checkpoint: Checkpoint) -> bool:
    """Whether timm's tensors would leave anything out that is known about a model."""
    if checkpoint.provenance.preprocessing or checkpoint.provenance.class_names:
        return True
    return infer_config({e.timm: e.timm_shape for e in name_table(checkpoint.config)}) != checkpoint.config


def _metadata(config: DPNConfig, provenance: Provenance) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "safetensors")}
    try:
        fields = provenance._asdict()
        fields["preprocessing"] = provenance.preprocessing and dataclasses.asdict(provenance.preprocessing)
        metadata = {
            "format": FORMAT,
            "config": json.dumps(dataclasses.asdict(config)),
            "provenance": json.dumps(fields),
            "versions": json.dumps(versions),
        }
        read_metadata(metadata, sum(config.depths))  # what cannot be read back is not written
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model.provenance cannot be saved ({reason(error)})") from error
    return metadata
