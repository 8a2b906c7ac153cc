"""A model and its weights as one file of StableHLO, which runs where dpn_jax is not installed.

The file is what `jax.export` serializes, followed by a zip archive of one member, `METADATA`: JSON that says how to
prepare images and what the logits mean. JAX reads the beginning of the file, and zip readers its end.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from dpn_jax.checkpoint.write import writable_path, write_atomically
from dpn_jax.config import variant_of
from dpn_jax.errors import ExportError, reason, shown
from dpn_jax.fast.forward import FastForward, PlainForward
from dpn_jax.fast.grouped import Native
from dpn_jax.fast.plan import PLANS, Plan
from dpn_jax.images.labels import named_classes
from dpn_jax.inference.program import normalize
from dpn_jax.model import DPN
from dpn_jax.paths import local_copy
from dpn_jax.pretrained import Preprocessing, default_preprocessing

Platform = Literal["tpu", "cuda", "rocm", "cpu"]

BACKENDS: dict[str, str] = {"tpu": "tpu", "cuda": "gpu", "rocm": "gpu", "cpu": "cpu"}
"""The backend whose fast form a platform runs."""

METADATA = "dpn_jax.json"
"""The member of the archive at the end of the file."""

# with norms folded and paths separate, as everywhere, but kernels stored once, in the layout that runs everywhere
PORTABLE = Plan(grouped=((32, Native()),))


def export_model(
    model: DPN,
    path: str | Path,
    *,
    platforms: Sequence[Platform] = ("tpu", "cuda", "cpu"),
    batch_size: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    uint8: bool = False,
    fast: bool = True,
    overwrite: bool = False,
) -> jax.export.Exported:
    """Writes a model's forward pass and its weights into one file.

    For one platform this is the platform's fast form (`fast_forward`). For several it is one form for all of them with
    XLA's native grouped convolutions, since the fast form of each platform would need its own copy of the weights.
    Where speed counts, write one file per platform. Reading the file takes only JAX and flatbuffers: `load_exported`,
    or `jax.export.deserialize(Path("dpn92.jaxexport").read_bytes()).call(images)`. JAX promises to read it for at least
    six months. Plain StableHLO, for other tools, is in its `mlir_module_serialized`. How to prepare images, the names
    of the classes and the source of the weights are JSON: `zipfile.ZipFile("dpn92.jaxexport").read("dpn_jax.json")`.

    Args:
      model: the model; exported in eval mode, computing in its `dtype`.
      path: the file, usually `*.jaxexport`; written atomically.
      platforms: where the file will run, any of 'tpu', 'cuda', 'rocm' and 'cpu'; none has to be present here.
      batch_size: images per batch; defaults to any number (a symbolic dimension, compiled per size when called).
      image_size: side of the images, or their (height, width), pixels; defaults to that of the weights, or of the
        architecture's default weights.
      uint8: take uint8 images, resized and cropped, and normalize them in the program: a quarter of the bytes to send.
      fast: False exports the plain form, the model as it is, which any changed model needs.
      overwrite: replace an existing file.

    Returns:
      What was written: a function from images `[B, H, W, C]`, normalized float32 or uint8, to float32 logits
      `[B, num_classes]`.

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
    dtype = jnp.uint8 if uint8 else jnp.float32
    images = jax.ShapeDtypeStruct((batch, settings.height, settings.width, model.config.in_channels), dtype)

    def dpn(images: jax.Array) -> jax.Array:
        if uint8:
            images = normalize(images, settings)
        return forward.apply(forward.params, images).astype(jnp.float32)

    exported = jax.export.export(jax.jit(dpn), platforms=platforms)(images)
    try:
        write_atomically(path, [_with_metadata(exported.serialize(), _metadata(model, settings, exported))])
    except OSError as error:
        raise ExportError(f"{shown(path)}: cannot be written ({reason(error)})") from error
    return exported


def load_exported(path: str | Path) -> jax.export.Exported:
    """Reads a file that `export_model` wrote.

    Args:
      path: the file, also in a bucket ('gs://bucket/dpn92.jaxexport').

    Returns:
      JAX's object: `jax.jit(exported.call)` maps images, normalized float32 or uint8 `[B, H, W, C]`, to float32 logits;
      `exported.platforms` and `exported.in_avals` are the platforms and the shapes it runs on.

    Raises:
      ExportError: the file is missing, damaged, or from a newer JAX.

    Example:
      >>> load_exported("no-such-file.jaxexport")
      Traceback (most recent call last):
      dpn_jax.errors.ExportError: no-such-file.jaxexport: No such file or directory
    """
    path = local_copy(path, error=ExportError)
    try:
        return jax.export.deserialize(bytearray(path.read_bytes()))
    except OSError as error:
        raise ExportError(f"{shown(path)}: {reason(error)}") from error
    except Exception as error:  # on damaged files flatbuffers raises nearly anything
        raise ExportError(
            f"{shown(path)}: not an exported model, damaged, or from a newer JAX ({type(error).__name__})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What is in a file of `export_model`."""

    path: Path
    exported: jax.export.Exported
    preprocessing: Preprocessing
    """How images are prepared; a program that takes uint8 normalizes them itself."""
    class_names: tuple[str, ...]
    synsets: tuple[str | None, ...]
    """WordNet ids of the classes, for ImageNet-1k."""

    def require(self, backend: str) -> None:
        """Raises ExportError if it does not run on a backend: 'cpu', 'gpu' or 'tpu'."""
        if backend not in {BACKENDS.get(platform) for platform in self.exported.platforms}:
            platforms = ", ".join(self.exported.platforms)
            raise ExportError(f"{shown(self.path)}: exported for {platforms}, not for {backend}; export it again")


def read_artifact(path: str | Path) -> Artifact:
    """Reads a file that `export_model` wrote, with what it says about images and classes.

    Raises:
      ExportError: as `load_exported`, or the file was written by dpn_jax 0.1.0, which had none of that.

    Example:
      >>> read_artifact("no-such-file.jaxexport")
      Traceback (most recent call last):
      dpn_jax.errors.ExportError: no-such-file.jaxexport: No such file or directory
    """
    path = local_copy(path, error=ExportError)
    exported = load_exported(path)
    try:
        with zipfile.ZipFile(path) as archive:
            fields = json.loads(archive.read(METADATA))
        artifact = Artifact(
            path=path,
            exported=exported,
            preprocessing=Preprocessing(**fields["preprocessing"]),
            class_names=tuple(str.strip(name) for name in fields["class_names"]),
            synsets=tuple(fields["synsets"]),
        )
        (_, height, width, channels), (_, classes) = exported.in_avals[0].shape, exported.out_avals[0].shape
    except (zipfile.BadZipFile, LookupError, TypeError, ValueError) as error:
        raise ExportError(
            f"{shown(path)}: does not say how to prepare images ({reason(error)}); export the model again"
        ) from error
    settings = artifact.preprocessing
    expected = (settings.height, settings.width, len(settings.mean), len(artifact.class_names), len(artifact.synsets))
    if (height, width, channels, classes, classes) != expected:
        raise ExportError(f"{shown(path)}: its program and what it says of it do not agree; export the model again")
    return artifact


def _metadata(model: DPN, settings: Preprocessing, exported: jax.export.Exported) -> dict[str, object]:
    class_names, synsets = named_classes(model.provenance.class_names, model.config.num_classes)
    return {
        "format_version": 1,
        "architecture": variant_of(model.config),
        "source": model.provenance.source,
        "sha256": model.provenance.sha256,
        "dtype": str(model.dtype),
        "platforms": exported.platforms,
        "images": exported.in_avals[0].str_short(),
        "logits": exported.out_avals[0].str_short(),
        "preprocessing": dataclasses.asdict(settings),
        "class_names": class_names,
        "synsets": synsets,
    }


def _with_metadata(program: bytes | bytearray, metadata: dict[str, object]) -> memoryview:
    file = io.BytesIO()
    file.write(program)
    with zipfile.ZipFile(file, "a") as archive:  # appended, as a self-extracting archive is
        member = zipfile.ZipInfo(METADATA)  # of a fixed time: the same model gives the same bytes
        archive.writestr(member, json.dumps(metadata, indent=2, ensure_ascii=False), zipfile.ZIP_DEFLATED)
    return file.getbuffer()
