"""Options that several commands share: which model, and how photos are run through it."""

import dataclasses
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
from dpn_jax.model import DPN
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
    """A pretrained tag or hub id; with --weights, the architecture and preprocessing of FILE."""
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
class ClassifierOptions(ModelOptions):
    """How photos are run through a model."""

    labels: Annotated[str | None, option("FILE", "those of the weights")] = None
    """A text file with the name of each class, one per line."""
    batch_size: int = 16
    """Images per batch."""
    device: Annotated[str | None, option("KIND", "JAX's default device")] = None
    """Kind of device to run on: cpu, gpu or tpu."""
    exif: bool = False
    """Apply the EXIF orientation of photos; timm does not."""

    def check(self) -> None:
        """Checks what does not depend on the model, before anything is loaded.

        Raises:
          ValueError: an option is out of range, or there is no such device.
        """
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        find_device(self.device)

    def classifier(self) -> Classifier:
        """Loads the model as a classifier."""
        model, settings = self.load()
        return Classifier(
            model,
            transform=Transform(settings, exif=self.exif),
            labels=read_labels(self.labels, model.config.num_classes) if self.labels else None,
            batch_size=self.batch_size,
            device=find_device(self.device),
            donate=True,
        )


def find_device(kind: str | None) -> jax.Device | None:
    """Finds the first device of a kind, or returns None for JAX's default.

    Raises:
      ValueError: there is no such device; there is no silent fallback.
    """
    if kind is None:
        return None
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", kind)  # the first to ask for a device would initialize those of all kinds
        return jax.devices(kind)[0]
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        present = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"--device {kind}: there is no such device here, only {present}") from error
