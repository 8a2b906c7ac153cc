"""Options that several commands share: which model, and how photos are run through it."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.cli.output import describe, note
from dpn_jax.errors import shown
from dpn_jax.images.labels import read_labels
from dpn_jax.images.transform import Transform
from dpn_jax.inference.classifier import Classifier
from dpn_jax.inference.export import read_artifact
from dpn_jax.model import DPN
from dpn_jax.multihost import connect, meet
from dpn_jax.pretrained import PRETRAINED, Preprocessing, default_preprocessing

Dtype = Literal["float32", "bfloat16", "float16"]

DEFAULT_TAG = "dpn92.mx_in1k"


def option(metavar: str, default: str = "", *, hint: str = "") -> object:
    """How the help shows an argument.

    Args:
      metavar: name of the value.
      default: what None means, in words; defaults to nothing.
      hint: what to show instead of a default.
    """
    hint = hint or (f"(defaults to {default})" if default else "")
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    traceback: bool = False
    """Print the whole traceback of an error; may stand anywhere."""  # read by main.guarded, not from here

    def run(self) -> int:
        """Does what the command is there for; returns its exit code."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Command):
    """Which model, and the size of its images."""

    # one line each: tyro keeps the line breaks of longer ones
    model: Annotated[str | None, option("TAG", f"{DEFAULT_TAG} without --weights")] = None
    """A pretrained tag, hub id or saved folder; with --weights, the architecture and preprocessing of FILE."""
    weights: Annotated[str | None, option("FILE")] = None
    """A file of weights, timm's or ours, or the folder of a finished fine-tuning run."""
    revision: Annotated[str | None, option("REVISION")] = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "float32"
    """Dtype of the arithmetic."""
    image_size: Annotated[int | None, option("PIXELS", "that of the weights")] = None
    """Side of the prepared images, at least 32."""
    use_test_size: bool = False
    """Use the larger image size that timm tests some weights at."""
    test_time_pool: bool = False
    """Mean-max pooling over windows of the training size, for larger images."""
    allow_nonfinite: bool = False
    """Accept weights with NaN, infinity or negative variances."""

    def load(self) -> tuple[DPN, Preprocessing]:
        """Loads the model, in eval mode, and the preprocessing of its images."""
        model = from_pretrained(
            Path(self.weights) if self.weights else self.model or DEFAULT_TAG,
            model=self.model if self.weights else None,
            dtype=self.dtype,
            revision=self.revision,
            test_time_pool=7 if self.test_time_pool else None,
            allow_nonfinite=self.allow_nonfinite,
        )
        settings = model.provenance.preprocessing
        tag = PRETRAINED.get((self.model or ("" if self.weights else DEFAULT_TAG)).removeprefix("timm/"))
        if tag:
            settings = (self.use_test_size and tag.test_preprocessing) or tag.preprocessing
        elif settings is None:
            settings = default_preprocessing(model.config)
            note(f"{shown(self.weights or self.model)}: has no preprocessing; using {describe(settings)} (see --model)")
        if self.image_size is not None:
            settings = dataclasses.replace(settings, image_size=self.image_size)
        return model, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(Command):
    """Several processes that work on one thing, one on each host."""

    coordinator: Annotated[str | None, option("HOST:PORT")] = None
    """Address of process 0, to run in several processes."""
    processes: Annotated[int | None, option("N")] = None
    """Number of processes."""
    process_index: Annotated[int | None, option("INDEX")] = None
    """Index of this process, from 0; process 0 writes."""
    distributed: bool = False
    """Run in the processes that the cluster (TPU, Slurm, Open MPI) has started."""

    def join(self) -> None:
        """Joins the other processes if there are any; must come before anything else that uses JAX's devices."""
        if self.distributed or (self.coordinator, self.processes, self.process_index) != (None, None, None):
            connect(self.coordinator, self.processes, self.process_index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ProcessOptions, ModelOptions):
    """How photos are run through a model."""

    labels: Annotated[str | None, option("FILE", "those of the weights")] = None
    """A text file with the name of each class, one per line."""
    batch_size: int = 16
    """Images per batch, over all devices."""
    device: Annotated[str | None, option("KIND", "JAX's default device")] = None
    """Kind of device to run on: cpu, gpu or tpu."""
    devices: Annotated[int | Literal["all"], option("N|all", "1")] = 1
    """Devices of this host that share each batch; a CPU has as many as cores."""
    workers: int = 0
    """Processes that read photos; 0 is a thread for each core."""
    exif: bool = False
    """Apply the EXIF orientation of photos; timm does not."""
    fast_decode: bool = False
    """Decode large JPEG photos at a half to an eighth of their size: faster, not quite the same pixels."""
    exported: Annotated[str | None, option("FILE")] = None
    """A file of dpn-jax export to run, instead of a model."""

    def check(self) -> None:
        """Checks what does not depend on the model, before anything is loaded.

        Raises:
          ValueError: an option is out of range, or there is no such device.
        """
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")
        if self.exported and (clash := [name for name in _OF_A_MODEL if getattr(self, name) != _default(name)]):
            raise ValueError(f"--{clash[0].replace('_', '-')} has no effect with --exported, whose model is complete")
        self.join()
        find_devices(self.device, self.devices)
        meet()

    def classifier(self) -> Classifier:
        """Loads the model as a classifier."""
        options = {
            "batch_size": self.batch_size,
            "devices": find_devices(self.device, self.devices),
            "workers": self.workers,
        }
        if self.exported:
            artifact = read_artifact(self.exported)
            labels = read_labels(self.labels, len(artifact.class_names)) if self.labels else None
            transform = Transform(artifact.preprocessing, exif=self.exif, fast_decode=self.fast_decode)
            return Classifier.from_exported(artifact, transform=transform, labels=labels, **options)
        model, settings = self.load()
        return Classifier(
            model,
            transform=Transform(settings, exif=self.exif, fast_decode=self.fast_decode),
            labels=read_labels(self.labels, model.config.num_classes) if self.labels else None,
            donate=True,
            **options,
        )


_OF_A_MODEL = (
    "model",
    "weights",
    "revision",
    "dtype",
    "image_size",
    "use_test_size",
    "test_time_pool",
    "allow_nonfinite",
)


def _default(name: str) -> object:
    return ModelOptions.__dataclass_fields__[name].default


def find_devices(kind: str | None, count: int | Literal["all"] = 1) -> tuple[jax.Device, ...]:
    """Finds devices of this host.

    Args:
      kind: 'cpu', 'gpu' or 'tpu'; defaults to JAX's default.
      count: how many, or all of them.

    Raises:
      ValueError: there are none or not as many; there is no silent fallback.
    """
    with contextlib.suppress(RuntimeError):  # devices are in use already, or the environment says how many
        if count != 1 and jax.config.jax_num_cpu_devices < 1 and "host_platform_device_count" not in _xla_flags():
            jax.config.update("jax_num_cpu_devices", os.cpu_count())
    before = jax.config.jax_platforms
    try:
        if kind is not None:
            jax.config.update("jax_platforms", kind)  # the first to ask would initialize devices of all kinds
        found = jax.local_devices(backend=kind)
    except RuntimeError as error:
        if kind is None:
            raise
        jax.config.update("jax_platforms", before)
        present = ", ".join(sorted({device.platform for device in jax.local_devices()}))
        raise ValueError(f"--device {kind}: there is no such device here, only {present}") from error
    if count == "all":
        return tuple(found)
    if not 1 <= count <= len(found):
        raise ValueError(f"--devices must be all or 1 to {len(found)} here ({found[0].platform}), got {count}")
    return tuple(found[:count])


def _xla_flags() -> str:
    return os.environ.get("XLA_FLAGS", "")
