"""The second half of loading: `from_pretrained` builds a checkpoint's model, `load(path, into=model)` restores one."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.checkpoint.names import list_differences, name_table
from dpn_jax.checkpoint.open import Checkpoint, open_checkpoint
from dpn_jax.config import DPNConfig
from dpn_jax.errors import CheckpointError, shown
from dpn_jax.model import DPN
from dpn_jax.operations import check_arguments
from dpn_jax.stock import abstract_model, changes


def from_pretrained(
    source: str | Path,
    *,
    model: str | DPNConfig | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    global_pool: str | None = None,
    drop_rate: float | None = None,
    output_stride: int | None = None,
    test_time_pool: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    revision: str | None = None,
    rngs: nnx.Rngs | None = None,
    allow_nonfinite: bool = False,
) -> DPN:
    """A DPN with trained weights, in eval mode.

    Args:
      source: a tag ('dpn92.mx_in1k'), a hub id ('timm/dpn92.mx_in1k', 'hf-hub:you/your-dpn'), a file of timm's or ours
        (.safetensors, .pth, .bin), or a folder: config.json and weights, or a finished fine-tuning run. Files and
        folders may be in a bucket: 'gs://bucket/run'.
      model: the variant or config; defaults to what the file says or its tensors tell.
      num_classes: another number than the file's gives a freshly initialized classifier; 0 gives none.
      in_channels: another number than the file's adapts the first convolution by timm's rule: 1 sums the colors, N
        repeats them and scales by 3/N.
      global_pool, drop_rate, output_stride, test_time_pool: see `DPNConfig`.
      dtype: dtype of the arithmetic.
      param_dtype: dtype of the parameters, whatever the file's is.
      remat: see `DPN`.
      revision: branch, tag or commit on the hub.
      rngs: streams `params` for a new classifier and `dropout`; defaults to `nnx.Rngs(0)`.
      allow_nonfinite: accept NaN, infinity and negative running variances.

    Raises:
      CheckpointError: the checkpoint cannot be obtained, is damaged, does not fit, or is a changed model's (`load`).
      ValueError: an unknown name or an argument out of range.

    Source: `timm.create_model(pretrained=True)`, `timm.models._builder.load_pretrained`.
    """
    check_arguments(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    checkpoint = open_checkpoint(source, model=model, revision=revision)
    checkpoint.require_stock()
    rngs = nnx.Rngs(0) if rngs is None else rngs
    requested = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "global_pool": global_pool,
        "drop_rate": drop_rate,
        "output_stride": output_stride,
        "test_time_pool": test_time_pool,
    }
    config = checkpoint.config.replace(**{name: value for name, value in requested.items() if value is not None})
    fresh_head = _needs_fresh_head(checkpoint.config, config, explicit=num_classes is not None)
    body = config.replace(num_classes=0) if fresh_head else config
    stem = checkpoint.tensors["stem.conv.kernel"]
    adapted = stem._replace(read=lambda: adapt_input_channels(stem.read(), config.in_channels))
    checkpoint = dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {"stem.conv.kernel": adapted})

    dtypes = {e.flax: np.dtype(np.int32 if e.is_counter else param_dtype) for e in name_table(body)}
    arrays = checkpoint.read_all(dtypes, allow_nonfinite=allow_nonfinite)
    arrays = dict(zip(arrays, jax.block_until_ready(jax.device_put(list(arrays.values()))), strict=True))
    structure, abstract = _abstract(body, jnp.dtype(dtype), jnp.dtype(param_dtype), remat)
    state = {path: variable.replace(arrays[dotted(path)]) for path, variable in abstract}
    built = nnx.merge(structure, nnx.from_flat_state(state))
    preprocessing = checkpoint.provenance.preprocessing
    built.provenance = checkpoint.provenance._replace(
        preprocessing=preprocessing and preprocessing.for_channels(config.in_channels)
    )
    if fresh_head:
        built.reset_classifier(config.num_classes, rngs=rngs)
    if config.drop_rate:
        built.dropout = nnx.Dropout(config.drop_rate, deterministic=True, rngs=rngs)
    return built


def load(path: str | Path, *, into: nnx.Module | None = None, **options: object) -> DPN:
    """Reads a model from a file, never from the hub.

    A stock model is built as by `from_pretrained`. A changed one (another block, norm, head, activation) is restored
    into an instance that was made and changed in the same way. A stock model's weights also go into a changed instance,
    if all paths and shapes fit.

    Args:
      path: what `save` wrote, or timm's file.
      into: a model to restore, in place. Its parameters keep their dtype, and its RNG state stays.
      options: the keywords of `from_pretrained`; only `allow_nonfinite` goes with `into`.

    Returns:
      The model, in eval mode.

    Raises:
      CheckpointError: the file is missing, damaged, or does not fit: with `into` all differences are listed, and the
        model stays as it was.
      ValueError: an argument out of range, or one that does not go with `into`.

    Example:
      >>> import dpn_jax, pathlib, tempfile
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=2)
      >>> model.norm.activation = "silu"
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "changed.safetensors"
      >>> dpn_jax.save(model, path)
      >>> other = dpn_jax.create_model("dpn_tiny", num_classes=2, rngs=nnx.Rngs(1))
      >>> other.norm.activation = "silu"
      >>> load(path, into=other) is other
      True
      >>> bool((other.classifier.kernel[...] == model.classifier.kernel[...]).all())
      True
    """
    if into is None:
        return from_pretrained(Path(path), **options)
    allow_nonfinite = bool(options.pop("allow_nonfinite", False))
    if options:
        given = ", ".join(f"{name}=" for name in options)
        raise ValueError(f"into= restores a model as it was made; {given} cannot be given with it")
    if not isinstance(into, nnx.Module):
        raise ValueError(f"into= must be a model, got {into!r}")
    checkpoint = open_checkpoint(Path(path))
    values = saved_values(into)
    _check_instance(checkpoint, into, {dotted(path): value for path, value in values.items()})
    dtypes = {dotted(path): value.dtype for path, value in values.items()}
    arrays = checkpoint.read_all(dtypes, allow_nonfinite=allow_nonfinite)
    shardings = [value.sharding if getattr(value, "committed", False) else None for value in values.values()]
    restored = [jax.device_put(array, sharding) for array, sharding in zip(arrays.values(), shardings, strict=True)]
    nnx.update(into, nnx.from_flat_state(dict(zip(values, restored, strict=True))))
    into.eval()
    into.provenance = checkpoint.provenance
    return into


def saved_values(model: nnx.Module) -> dict[tuple[str | int, ...], jax.Array]:
    """The values that a file holds of a model, by path: parameters, statistics and so on, but no RNG state.

    Raises:
      ValueError: a value is no array; the message names it.
    """
    values = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        values[path] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        if not hasattr(values[path], "dtype"):
            kind = type(values[path]).__name__
            raise ValueError(f"{dotted(path)} is a {kind}, which a file cannot hold; make it an array")
    return values


def dotted(path: tuple[str | int, ...]) -> str:
    """A path as a name, such as 'stages.0.1.reduce.conv.kernel'."""
    return ".".join(map(str, path))


def adapt_input_channels(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """Changes the number of channels that the first convolution reads, keeping the scale of its output.

    Args:
      kernel: `[H, W, 3, O]`.
      in_channels: 1 sums the colors; N repeats them in order up to N, and scales by 3/N.

    Returns:
      `[H, W, in_channels, O]`, of the same dtype.

    Raises:
      ValueError: the kernel does not read 3 channels.

    Source: `timm.models._manipulate.adapt_input_conv`.
    """
    colors = kernel.shape[2]
    if colors == in_channels:
        return kernel
    if colors != 3:
        raise ValueError(f"in_channels={in_channels} can be adapted from 3 channels, but the weights read {colors}")
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32) if kernel.dtype.kind == "f" else np.float32)
    if in_channels == 1:
        adapted = wide.sum(axis=2, keepdims=True)
    else:
        adapted = wide[:, :, np.arange(in_channels) % 3] * np.asarray(3 / in_channels, wide.dtype)
    return adapted.astype(kernel.dtype)


def _check_instance(checkpoint: Checkpoint, model: nnx.Module, values: Mapping[str, jax.Array]) -> None:
    """Compares a checkpoint's names, shapes and changes with a model's."""
    tensors = checkpoint.tensors
    counters = {name for name, value in values.items() if value.shape == () and name.endswith(".steps")}
    missing = tuple(sorted(values.keys() - tensors.keys() - counters))
    unknown = tuple(sorted(tensor.file_name or name for name, tensor in tensors.items() if name not in values))
    misshaped = []
    for name in values.keys() & tensors.keys():
        tensor, value = tensors[name], values[name]
        if tensor.shape != value.shape:
            misshaped.append(f"{tensor.file_name or name}: {list(tensor.shape)}, expected {list(value.shape)}")
        elif tensor.shape and jnp.issubdtype(tensor.dtype, jnp.floating) != jnp.issubdtype(value.dtype, jnp.floating):
            misshaped.append(f"{tensor.file_name or name}: {tensor.dtype}, expected {value.dtype}")
    changed = _compare_changes(checkpoint.changes, changes(model)) if checkpoint.changes else []
    if not checkpoint.is_timm:
        changed += _compare_configs(checkpoint.config, getattr(model, "config", checkpoint.config))
    if missing or unknown or misshaped or changed:
        listed = {"missing": missing, "unknown": unknown, "misshaped": sorted(misshaped), "changed": changed}
        raise CheckpointError(
            f"{shown(checkpoint.path)}: does not fit the model: {list_differences(listed)}",
            missing=missing,
            unknown=unknown,
            misshaped=tuple(sorted(misshaped)),
        )


def _compare_changes(in_file: Mapping[str, str], in_model: Mapping[str, str]) -> list[str]:
    """Where two models were changed differently, such as 'norm: a MyNorm in the file, a NormAct in the model'."""

    def side(change: str, other: str) -> str:
        # 'is a MyNorm, not a NormAct' tells both sides
        return change.partition(", not ")[0].removeprefix("is ") or other.partition(", not ")[2] or "stock"

    return [
        shown(f"{path or 'the model'}: {side(ours, theirs)} in the file, {side(theirs, ours)} in the model")
        for path in sorted(in_file.keys() | in_model.keys())
        if (ours := in_file.get(path, "")) != (theirs := in_model.get(path, ""))
    ]


def _compare_configs(in_file: DPNConfig, in_model: DPNConfig) -> list[str]:
    """What two architectures of equal names and shapes may compute differently."""
    names = ("global_pool", "outer_activation", "output_stride")
    pairs = ((name, getattr(in_file, name), getattr(in_model, name)) for name in names)
    return [
        f"config: {name} {ours!r} in the file, {theirs!r} in the model"
        for name, ours, theirs in pairs
        if ours != theirs
    ]


def _needs_fresh_head(given: DPNConfig, wanted: DPNConfig, *, explicit: bool) -> bool:
    if not wanted.num_classes:
        return False
    if given.num_classes == wanted.num_classes and given.head_features == wanted.head_features:
        return False
    if not explicit:
        raise ValueError(
            f"global_pool={wanted.global_pool!r} gives the classifier {wanted.head_features} features, but the "
            f"checkpoint's reads {given.head_features}; pass num_classes to start a new one"
        )
    return True


@functools.lru_cache(maxsize=8)
def _abstract(
    config: DPNConfig, dtype: np.dtype, param_dtype: np.dtype, remat: bool
) -> tuple[nnx.GraphDef, list[tuple[tuple[str | int, ...], nnx.Variable]]]:
    """The structure of a model, and its variables without values, by path."""
    structure, state = nnx.split(abstract_model(config, dtype, param_dtype, remat))
    return structure, list(nnx.to_flat_state(state))
