"""timm's evaluation transform: resize, crop, normalize, bit for bit (Pillow and NumPy only)."""

import dataclasses
import math

import numpy as np
from PIL import Image

from dpn_jax.config import unknown_name_message
from dpn_jax.errors import ImageError
from dpn_jax.images.read import MAX_PIXELS, ImageSource, read_image, source_name
from dpn_jax.pretrained import INTERPOLATIONS, PRETRAINED, Preprocessing

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}


@dataclasses.dataclass(frozen=True)
class Transform:
    """Prepares images for a set of weights, equal to timm's evaluation transform.

    The image is resized to about `floor(image_size / crop_fraction)`, as `crop_mode` says, the center is cropped, and
    the values are scaled to [0, 1] and normalized. The pixels before normalization and the floats after it are the same
    bits as timm's.

    Args:
      preprocessing: sizes, interpolation, mean and standard deviation; if it has one channel, images are read as gray.
      exif: apply the EXIF orientation of images; timm does not.
      fast_decode: decode large JPEG files at 1/2, 1/4 or 1/8 of their size, where no side gets smaller than what it is
        resized to. Not the same pixels: see `docs/tpu.md` for what that does to predictions.

    Raises:
      ValueError: `preprocessing` has neither one nor three channels.

    Example:
      >>> transform = Transform(Preprocessing(image_size=64))
      >>> transform(np.zeros((300, 400, 3), np.uint8)).shape
      (64, 64, 3)

    Source: `timm.data.transforms_factory.transforms_imagenet_eval`.
    """

    preprocessing: Preprocessing
    exif: bool = dataclasses.field(default=False, kw_only=True)
    fast_decode: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.preprocessing.mean) not in _MODES:
            raise ValueError(
                f"preprocessing must have 3 channels (RGB) or 1 (gray), got mean={self.preprocessing.mean!r}"
            )

    def __call__(self, source: ImageSource) -> np.ndarray:
        """Reads, resizes, crops and normalizes one image.

        Args:
          source: what `read_image` accepts.

        Returns:
          float32 [height, width, C], C as in `preprocessing.mean`.

        Raises:
          ImageError: as `crop`.
        """
        return self.normalize(self.crop(source))

    def crop(self, source: ImageSource) -> np.ndarray:
        """Reads, resizes and crops one image: everything but the normalization.

        Args:
          source: what `read_image` accepts.

        Returns:
          uint8 [height, width, C].

        Raises:
          ImageError: `read_image` fails, or the image is so narrow that it would have no pixels once it is resized, or
            more than `MAX_PIXELS` (a shorter side of 256 pixels: beyond about 1:1365), which takes timm gigabytes.
        """
        settings = self.preprocessing
        at_least = max(self._target) if self.fast_decode else None
        image = read_image(source, exif=self.exif, mode=_MODES[len(settings.mean)], at_least=at_least)
        width, height = self._resized(image.width, image.height)
        if not 0 < width * height <= MAX_PIXELS:
            allowed = f"more than the {MAX_PIXELS:,} pixels allowed" if width and height else "nothing"
            raise ImageError(
                f"{source_name(source)}: {image.width} x {image.height} pixels would be resized to {width} x {height}, "
                f"{allowed}; crop the image first"
            )
        image = image.resize((width, height), _FILTERS[settings.interpolation])
        if width < settings.width or height < settings.height:  # only where crop_mode is 'border'
            image = _with_borders(image, settings)
        # Halves round to even, as in torchvision's center_crop
        left, top = round((image.width - settings.width) / 2), round((image.height - settings.height) / 2)
        pixels = np.array(image.crop((left, top, left + settings.width, top + settings.height)))
        return pixels.reshape(*pixels.shape[:2], -1)

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Which part of an image `crop` shows.

        Args:
          width, height: of the image, as it is shown: after its EXIF orientation, if that is applied.

        Returns:
          Left, top, right and bottom in pixels of the image, from its upper left corner; beyond its sides where
          `crop_mode` is 'border'.

        Example:
          >>> Transform(Preprocessing(image_size=100, crop_fraction=0.5)).region(400, 400)
          (100.0, 100.0, 300.0, 300.0)
        """
        settings, resized = self.preprocessing, self._resized(width, height)
        edges = []
        for side, new, wanted in zip((width, height), resized, (settings.width, settings.height), strict=True):
            canvas = max(new, wanted)
            start = round((canvas - wanted) / 2) - (canvas - new) // 2
            edges.append((start * side / new, (start + wanted) * side / new))
        (left, right), (top, bottom) = edges
        return left, top, right, bottom

    @property
    def _target(self) -> tuple[int, int]:
        """Width and height of the crop before it was cropped."""
        settings = self.preprocessing
        return tuple(math.floor(side / settings.crop_fraction) for side in (settings.width, settings.height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image is resized to before the crop."""
        settings, target = self.preprocessing, self._target
        if settings.crop_mode == "squash":
            return target
        if settings.crop_mode == "center" and target[0] == target[1]:
            # Truncated, not rounded: torchvision.transforms.functional._compute_resized_output_size
            return tuple(int(target[0] * side / min(width, height)) for side in (width, height))
        # Rounded, halves to even: timm.data.transforms.ResizeKeepRatio
        ratios = width / target[0], height / target[1]
        ratio = max(ratios) if settings.crop_mode == "border" else min(ratios)
        return round(width / ratio), round(height / ratio)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Scales to [0, 1], subtracts the mean and divides by the standard deviation.

        Args:
          pixels: uint8 [..., C], such as one image [H, W, C] or a batch [B, H, W, C].

        Returns:
          float32 of the same shape, from the same float32 operations in the same order as torch, so the same bits.

        Raises:
          ValueError: `pixels` has another dtype or number of channels.

        Example:
          >>> Transform(Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)).normalize(np.array([[[0, 51, 255]]], np.uint8))
          array([[[-1. , -0.6,  1. ]]], dtype=float32)

        Source: `torchvision.transforms.functional.to_tensor` and `normalize`.
        """
        pixels = np.asarray(pixels)
        channels = len(self.preprocessing.mean)
        if pixels.dtype != np.uint8 or pixels.shape[-1:] != (channels,):
            raise ValueError(f"pixels must be uint8 [..., {channels}], got {pixels.dtype} {list(pixels.shape)}")
        values = pixels.astype(np.float32)
        values /= np.float32(255)
        values -= np.asarray(self.preprocessing.mean, np.float32)
        values /= np.asarray(self.preprocessing.std, np.float32)
        return values


def _with_borders(image: Image.Image, settings: Preprocessing) -> Image.Image:
    """The image in the middle of the mean color, as large as the crop; timm.data.transforms.center_crop_or_pad."""
    color = tuple(round(255 * min(max(mean, 0), 1)) for mean in settings.mean)
    canvas = Image.new(image.mode, (max(image.width, settings.width), max(image.height, settings.height)), color)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


def preprocessing(
    source: str | Preprocessing,
    *,
    use_test_size: bool = False,
    image_size: int | tuple[int, int] | None = None,
    exif: bool = False,
    fast_decode: bool = False,
) -> Transform:
    """The transform that a set of weights was evaluated with.

    Args:
      source: a pretrained tag, with or without the prefix 'timm/', or a `Preprocessing`, such as a model's
        `provenance.preprocessing`.
      use_test_size: use the larger image size that timm tests some weights at (`dpn68b.ra_in1k`), if there is one.
      image_size: side of the prepared images, or their (height, width), pixels, at least 32; defaults to that of the
        weights. `crop_fraction` does not change.
      exif, fast_decode: as for `Transform`.

    Returns:
      A transform from a path, PIL image or uint8 array to float32 [H, W, 3].

    Raises:
      ValueError: the tag is unknown (a variant without a tag has no preprocessing), or an argument is out of range.

    Example:
      >>> transform = preprocessing("dpn68b.ra_in1k", use_test_size=True)
      >>> transform(np.zeros((300, 400, 3), np.uint8)).shape
      (288, 288, 3)

    Source: `timm.data.config.resolve_data_config`.
    """
    if isinstance(source, Preprocessing):
        settings = source
    else:
        tag = PRETRAINED.get(str(source).removeprefix("timm/"))
        if tag is None:
            advice = "for a file, a run or a hub id give model.provenance.preprocessing"
            raise ValueError(f"{unknown_name_message(source, PRETRAINED)}; {advice}")
        settings = (use_test_size and tag.test_preprocessing) or tag.preprocessing
    if image_size is not None:
        settings = dataclasses.replace(settings, image_size=image_size)
    return Transform(settings, exif=exif, fast_decode=fast_decode)
