"""The published weights: tags, how images are prepared for them, figures (standard library only)."""

import dataclasses
import numbers
import sys
from typing import NamedTuple, Self

from dpn_jax.config import VARIANTS, DPNConfig, is_int, unknown_name_message, variant_of

DPN_MEAN = (124 / 255, 117 / 255, 104 / 255)
DPN_STD = (1 / (0.0167 * 255),) * 3
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
_MAX_SIDE = 65_535
"""Pixels; a JPEG image is not larger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are prepared for a set of weights (timm's `pretrained_cfg`).

    Args:
      image_size: what the network sees, pixels, at least 32: the side of a square, or (height, width).
      crop_fraction: what the crop keeps of each side of the resized image, in (0, 1]; `image_size / crop_fraction`,
        rounded down, is the size to resize to.
      interpolation: 'bicubic', 'bilinear', 'lanczos', 'nearest', 'box' or 'hamming'.
      crop_mode: timm's name for how an image of another shape is made to fit: 'center' resizes its shorter side and
        loses the ends of the longer one; 'squash' resizes both sides, without regard to its shape; 'border' resizes its
        longer side, and adds borders of the mean color.
      mean, std: per-channel normalization of values in [0, 1].

    Raises:
      ValueError: a field is of another type or out of its range; the message names it and the value.

    Example:
      >>> Preprocessing(image_size=(224, 320)).height
      224
    """

    image_size: int | tuple[int, int] = 224
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        size = self.image_size
        if isinstance(size, list | tuple) and len(size) == 2:  # a list, as JSON has it
            size = size[0] if size[0] == size[1] else tuple(size)
            object.__setattr__(self, "image_size", size)
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        if not all(is_int(side) and side >= 32 for side in sides):
            raise ValueError(
                f"image_size must be an integer, or (height, width), of at least 32 pixels, got {self.image_size!r}"
            )
        if not _is_number(self.crop_fraction) or not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction!r}")
        if max(sides) > _MAX_SIDE * self.crop_fraction:
            raise ValueError(
                f"image_size / crop_fraction must be at most {_MAX_SIDE} pixels, got {self.image_size!r} / "
                f"{self.crop_fraction!r}"
            )
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values or not all(map(_is_number, values)):
                raise ValueError(f"{name} must be finite numbers, one a channel, got {values!r}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean and std must be equally long and std positive, got {self.mean!r} and {self.std!r}")

    @property
    def height(self) -> int:
        """Height of the prepared images, pixels."""
        return self.image_size[0] if isinstance(self.image_size, tuple) else self.image_size

    @property
    def width(self) -> int:
        """Width of the prepared images, pixels."""
        return self.image_size[1] if isinstance(self.image_size, tuple) else self.image_size

    def for_channels(self, channels: int) -> Self:
        """The same for images of another number of channels, of which each gets the average mean and deviation.

        Args:
          channels: their number.

        Example:
          >>> Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.5, 0.5, 0.5)).for_channels(1).mean
          (0.5,)
        """
        if channels == len(self.mean):
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=(mean,) * channels, std=(std,) * channels)


def _is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold, and no boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Provenance(NamedTuple):
    """Where a model's weights come from; kept when it is saved. Every field may be unknown (None)."""

    source: str | None = None
    """A tag, hub id or file name."""
    sha256: str | None = None
    """SHA-256 that the hub promised for the downloaded file, in hexadecimal."""
    preprocessing: Preprocessing | None = None
    """How images must be prepared."""
    class_names: tuple[str, ...] | None = None
    """What the logits mean, where that is not ImageNet-1k."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedTag:
    """A variant with published weights.

    Args:
      variant: the architecture's name in `VARIANTS`.
      preprocessing: how timm evaluates these weights.
      test_preprocessing: how timm evaluates them with `use_test_size`, where that differs.
      top1, top5: accuracy with `preprocessing`, percent: the published one on ImageNet-1k (timm
        `results/results-imagenet.csv`), or on what `data` names.
      num_classes: width of the classifier.
      packaged: name of the file where it comes with this package; the others are on the hub.
      data: what the weights were trained for.
    """

    variant: str
    preprocessing: Preprocessing
    test_preprocessing: Preprocessing | None = None
    top1: float
    top5: float
    num_classes: int = 1000
    packaged: str | None = None
    data: str = "ImageNet-1k"

    @property
    def config(self) -> DPNConfig:
        """The architecture of the published weights."""
        return VARIANTS[self.variant].replace(num_classes=self.num_classes)


_MX = Preprocessing(mean=DPN_MEAN, std=DPN_STD)
_RA = Preprocessing(crop_fraction=0.95)


PRETRAINED: dict[str, PretrainedTag] = {
    "dpn68.mx_in1k": PretrainedTag(variant="dpn68", preprocessing=_MX, top1=76.304, top5=92.994),
    "dpn68b.mx_in1k": PretrainedTag(variant="dpn68b", preprocessing=_MX, top1=77.494, top5=93.834),
    "dpn68b.ra_in1k": PretrainedTag(
        variant="dpn68b",
        preprocessing=_RA,
        test_preprocessing=dataclasses.replace(_RA, image_size=288, crop_fraction=1.0),
        top1=78.546,
        top5=93.982,
    ),
    "dpn92.mx_in1k": PretrainedTag(variant="dpn92", preprocessing=_MX, top1=80.032, top5=94.876),
    "dpn98.mx_in1k": PretrainedTag(variant="dpn98", preprocessing=_MX, top1=79.664, top5=94.644),
    "dpn131.mx_in1k": PretrainedTag(variant="dpn131", preprocessing=_MX, top1=79.836, top5=94.708),
    "dpn107.mx_in1k": PretrainedTag(variant="dpn107", preprocessing=_MX, top1=80.166, top5=94.932),
    # trained by recipes/dpn_tiny_digits.md
    "dpn_tiny.digits": PretrainedTag(
        variant="dpn_tiny",
        preprocessing=Preprocessing(image_size=32, crop_fraction=1.0),
        top1=99.15,
        top5=100.0,
        num_classes=10,
        packaged="dpn_tiny_digits.safetensors",
        data="digits",
    ),
    # by recipes/dpn_mini_cifar10.md
    "dpn_mini.cifar10": PretrainedTag(
        variant="dpn_mini",
        preprocessing=Preprocessing(image_size=64),
        top1=85.09,
        top5=99.31,
        num_classes=10,
        packaged="dpn_mini_cifar10.safetensors",
        data="CIFAR-10",
    ),
}


def list_pretrained() -> list[str]:
    """Tags of the published weights that `from_pretrained` knows.

    Example:
      >>> list_pretrained()[3]
      'dpn92.mx_in1k'
    """
    return list(PRETRAINED)


def default_preprocessing(config: DPNConfig) -> Preprocessing:
    """What timm assumes for weights of which only the architecture is known: the variant's default tag's.

    Example:
      >>> default_preprocessing(get_config("dpn68b")) == PRETRAINED["dpn68b.ra_in1k"].preprocessing
      True
    """
    tags = [tag for tag in PRETRAINED.values() if tag.variant == variant_of(config)]
    preprocessing = tags[-1].preprocessing if tags else Preprocessing()
    return preprocessing.for_channels(config.in_channels)


def get_config(name: str) -> DPNConfig:
    """The configuration of a variant or pretrained tag.

    Raises:
      ValueError: the name is not known; the message suggests the nearest ones.

    Example:
      >>> get_config("dpn92").num_features
      2688
    """
    if name in PRETRAINED:
        return PRETRAINED[name].config
    if name not in VARIANTS:
        raise ValueError(unknown_name_message(name, [*VARIANTS, *PRETRAINED]))
    return VARIANTS[name]
