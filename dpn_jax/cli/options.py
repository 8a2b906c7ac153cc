"""Options that several commands have, and what becomes of them."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.cli.output import describe, note
from dpn_jax.images.labels import read_labels
from dpn_jax.images.transform import Transform
from dpn_jax.inference.classifier import Classifier
from dpn_jax.model import DPN
from dpn_jax.pretrained import PRETRAINED, Preprocessing, default_preprocessing

Dtype = Literal["float32", "bfloat16", "float16"]

DEFAULT_TAG = "dpn92.mx_in1k"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and the size of its images."""

    model: str | None = None
    """A pretrained tag or hub id (dpn92.mx_in1k when neither this nor --weights is given); beside --weights, the
    architecture and preprocessing of that file."""
    weights: str | None = None
    """A file of weights: timm's or ours."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Dtype = "float32"
    """Dtype of the arithmetic."""
    image_size: int | None = None
    """Side of the prepared images, pixels, at least 32."""
    use_test_size: bool = False
    """Prepare images at the larger size that timm tests some weights with."""
    test_time_pool: bool = False
    """Mean-max pooling over windows of the training size, for larger images."""
    allow_nonfinite: bool = False
    """Take weights with NaN, infinity or negative variances."""

    def load(self) -> tuple[DPN, Preprocessing]:
        """The model in eval mode, and how its images are prepared."""
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
            note(f"{self.weights}: does not say how to prepare images; taking {describe(settings)} (see --model)")
        if self.image_size is not None:
            settings = dataclasses.replace(settings, image_size=self.image_size)
        return model, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ModelOptions):
    """How photos are run through a model."""

    labels: str | None = None
    """A file with the name of each class, one a line."""
    batch_size: int = 16
    """Images run at once."""
    device: str | None = None
    """Run on this kind of device: cpu, gpu, tpu."""
    exif: bool = False
    """Turn photos as their EXIF orientation says; timm does not."""

    def check(self) -> None:
        """Refuses what is wrong whatever the model, before anything is loaded.

        Raises:
          ValueError: an option is out of its range, or there is no such device.
        """
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        find_device(self.device)

    def classifier(self) -> Classifier:
        """The loaded model as a classifier."""
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
    """The first device of a kind, or None for JAX's default.

    Raises:
      ValueError: there is none; nothing falls back silently.
    """
    if kind is None:
        return None
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        present = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"--device {kind}: there is no such device here, only {present}") from error
