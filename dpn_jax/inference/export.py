"""A model and its weights as one file of StableHLO, which runs where dpn_jax is not installed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from dpn_jax.checkpoint.write import writable_path, write_atomically
from dpn_jax.errors import ExportError, local_path, reason, shown
from dpn_jax.fast.forward import FastForward, PlainForward
from dpn_jax.fast.grouped import Native
from dpn_jax.fast.plan import PLANS, Plan
from dpn_jax.model import DPN
from dpn_jax.pretrained import default_preprocessing

Platform = Literal["tpu", "cuda", "rocm", "cpu"]

BACKENDS: dict[str, str] = {"tpu": "tpu", "cuda": "gpu", "rocm": "gpu", "cpu": "cpu"}
"""The backend whose fast form a platform runs."""

# with norms folded and paths separate, as everywhere, but kernels stored once, in the layout that runs everywhere
PORTABLE = Plan(grouped=((32, Native()),))


def export_model(
    model: DPN,
    path: str | Path,
    *,
    platforms: Sequence[Platform] = ("tpu", "cuda", "cpu"),
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    fast: bool = True,
    overwrite: bool = False,
) -> jax.export.Exported:
    """Writes a model's forward pass and its weights into one file.

    For one platform this is the platform's fast form (`fast_forward`). For several it is one form for all of them with
    XLA's native grouped convolutions, since the fast form of each platform would need its own copy of the weights.
    Where speed counts, write one file per platform. Reading the file takes only JAX and flatbuffers: `load_exported`,
    or `jax.export.deserialize(Path("dpn92.jaxexport").read_bytes()).call(images)`. JAX promises to read it for at least
    six months. Plain StableHLO, for other tools, is in its `mlir_module_serialized`.

    Args:
      model: the model; exported in eval mode, computing in its `dtype`.
      path: the file, usually `*.jaxexport`; written atomically.
      platforms: where the file will run, any of 'tpu', 'cuda', 'rocm' and 'cpu'; none has to be present here.
      batch_size: images per batch; defaults to any number (a symbolic dimension, compiled per size when called).
      image_size: side of the images, or their (height, width), pixels; defaults to that of the weights, or of the
        architecture's default weights.
      fast: False exports the plain form, the model as it is, which any changed model needs.
      overwrite: replace an existing file.

    Returns:
      What was written: a function from normalized float32 `[B, H, W, C]` to float32 logits `[B, num_classes]`.

    Raises:
      ExportError: the file exists and `overwrite` is not set, or it cannot be written: a URL, a folder, a special file.
      ValueError: `platforms` is empty or has an unknown or repeated platform, `batch_size` or `image_size` is out of
        range, or the model is not stock (see `dpn_jax.stock`) and `fast` is set.

    Example:
      >>> import dpn_jax, tempfile
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     written = export_model(model, Path(folder) / "tiny.jaxexport", platforms=["cpu"], image_size=64)
      >>> written.in_avals
      (ShapedArray(float32[b,64,64,3]),)

    Source: `jax.export`, https://docs.jax.dev/en/latest/export/export.html.
    """
    path = writable_path(path, overwrite=overwrite, error=ExportError)
    if unknown := [platform for platform in platforms if platform not in BACKENDS]:
        raise ValueError(f"platforms must be of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    if not platforms or len(set(platforms)) != len(platforms):
        raise ValueError(f"platforms must be one or more, without repeats, got {list(platforms)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    settings = model.provenance.preprocessing or default_preprocessing(model.config)
    if image_size is not None:
        settings = dataclasses.replace(settings, image_size=image_size)
    plan = PLANS[BACKENDS[platforms[0]]] if len(platforms) == 1 else PORTABLE
    forward = FastForward(model, plan) if fast else PlainForward(model)
    (batch,) = jax.export.symbolic_shape("b") if batch_size is None else (batch_size,)
    images = jax.ShapeDtypeStruct((batch, settings.height, settings.width, model.config.in_channels), jnp.float32)

    def dpn(images: jax.Array) -> jax.Array:
        return forward.apply(forward.params, images).astype(jnp.float32)

    exported = jax.export.export(jax.jit(dpn), platforms=platforms)(images)
    try:
        write_atomically(path, [exported.serialize()])
    except OSError as error:
        raise ExportError(f"{shown(path)}: cannot be written ({reason(error)})") from error
    return exported


def load_exported(path: str | Path) -> jax.export.Exported:
    """Reads a file that `export_model` wrote.

    Args:
      path: the file.

    Returns:
      JAX's object: `jax.jit(exported.call)` maps normalized float32 `[B, H, W, C]` to float32 logits;
      `exported.platforms` and `exported.in_avals` are the platforms and the shapes it runs on.

    Raises:
      ExportError: the file is missing, damaged, or from a newer JAX, or a URL.

    Example:
      >>> load_exported("no-such-file.jaxexport")
      Traceback (most recent call last):
      dpn_jax.errors.ExportError: no-such-file.jaxexport: No such file or directory
    """
    path = local_path(path, error=ExportError)
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except OSError as error:
        raise ExportError(f"{shown(path)}: {reason(error)}") from error
    except Exception as error:  # on damaged files flatbuffers raises nearly anything
        raise ExportError(
            f"{shown(path)}: not an exported model, damaged, or from a newer JAX ({type(error).__name__})"
        ) from error
