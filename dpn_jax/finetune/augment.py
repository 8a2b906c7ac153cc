"""Random augmentation of training images: PIL images in and out, all randomness from the given generator."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Fill = int | tuple[int, ...]
_BILINEAR = Image.Resampling.BILINEAR


def crop_box(
    width: int, height: int, generator: np.random.Generator, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a crop: a fraction of the area, an aspect ratio and a position.

    After ten draws that do not fit, takes the largest centered box whose aspect ratio is in `ratio`.

    Args:
      width, height: size of the image, pixels.
      generator: source of randomness.
      scale: range of the fraction of the area, in (0, 1].
      ratio: range of width / height, drawn log-uniformly.

    Returns:
      left, top, right and bottom, pixels, inside the image.

    Example:
      >>> crop_box(200, 100, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1))
      (50, 0, 150, 100)

    Source: `torchvision.transforms.RandomResizedCrop.get_params`.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(generator.integers(width - crop_width + 1))
            top = int(generator.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def random_crop(
    image: Image.Image,
    size: int,
    generator: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str = "bicubic",
) -> Image.Image:
    """Crops a random box (see `crop_box`) and resizes it to a square of `size` pixels.

    Example:
      >>> random_crop(Image.new("RGB", (64, 48)), 32, np.random.default_rng(0), scale=(0.5, 1), ratio=(1, 1)).size
      (32, 32)

    Source: `timm.data.transforms.RandomResizedCropAndInterpolation`.
    """
    box = crop_box(*image.size, generator, scale=scale, ratio=ratio)
    return image.crop(box).resize((size, size), Image.Resampling[interpolation.upper()])


def color_jitter(image: Image.Image, amount: float, generator: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast and saturation, in random order, each by a factor from 1 - amount to 1 + amount.

    Example:
      >>> color_jitter(Image.new("L", (2, 2), 100), 0.4, np.random.default_rng(0)).mode
      'L'

    Source: `torchvision.transforms.ColorJitter`, without hue.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in generator.permutation(len(enhancers)):
        image = enhancers[index](image).enhance(generator.uniform(max(0.0, 1 - amount), 1 + amount))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _BILINEAR, fillcolor=fill)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, level: float) -> Image.Image:
    return kind(image).enhance(max(0.1, 1 + 0.9 * level))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    lookup = [min(255, value + int(110 * abs(level))) if value < 128 else value for value in range(256)]
    return image.point(lookup * len(image.getbands()))


OPERATIONS: dict[str, Callable[[Image.Image, float, Fill], Image.Image]] = {
    "auto_contrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, fill: ImageOps.equalize(image),
    "invert": lambda image, level, fill: ImageOps.invert(image),
    "rotate": lambda image, level, fill: image.rotate(30 * level, _BILINEAR, fillcolor=fill),
    # at magnitude 10 timm asks for 0 bits, which newer Pillow rejects
    "posterize": lambda image, level, fill: ImageOps.posterize(image, max(1, 4 - int(4 * abs(level)))),
    "solarize": lambda image, level, fill: ImageOps.solarize(image, 256 - int(256 * abs(level))),
    "solarize_add": lambda image, level, fill: _solarize_add(image, level),
    "color": lambda image, level, fill: _enhance(ImageEnhance.Color, image, level),
    "contrast": lambda image, level, fill: _enhance(ImageEnhance.Contrast, image, level),
    "brightness": lambda image, level, fill: _enhance(ImageEnhance.Brightness, image, level),
    "sharpness": lambda image, level, fill: _enhance(ImageEnhance.Sharpness, image, level),
    "shear_x": lambda image, level, fill: _affine(image, (1, 0.3 * level, 0, 0, 1, 0), fill),
    "shear_y": lambda image, level, fill: _affine(image, (1, 0, 0, 0.3 * level, 1, 0), fill),
    "translate_x": lambda image, level, fill: _affine(image, (1, 0, 0.45 * level * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, level, fill: _affine(image, (1, 0, 0, 0, 1, 0.45 * level * image.height), fill),
}
"""The operations of `rand_augment`: image, level in [-1, 1] (0 changes least) and fill color."""


def rand_augment(
    image: Image.Image, generator: np.random.Generator, *, magnitude: float, layers: int, fill: Fill
) -> Image.Image:
    """Applies operations drawn with replacement from `OPERATIONS`, each with probability 0.5.

    Args:
      image: of mode 'RGB' or 'L'.
      generator: source of randomness.
      magnitude: strength of the operations, 0 to 10; the sign of those with a direction is random.
      layers: number of operations drawn.
      fill: color of the pixels that a moved image uncovers, one value 0 to 255 per channel.

    Returns:
      A new image of the same size and mode.

    Example:
      >>> rand_augment(Image.new("RGB", (8, 8)), np.random.default_rng(0), magnitude=9, layers=2, fill=(0, 0, 0)).size
      (8, 8)

    Source: RandAugment (arXiv 1909.13719); `timm.data.auto_augment.rand_augment_ops` with its increasing operations
    ('rand-m9-n2-inc1' for magnitude 9 and 2 layers), bilinear.
    """
    operations = tuple(OPERATIONS.values())
    for _ in range(layers):
        operation = operations[generator.integers(len(operations))]
        level = magnitude / 10 * (1 if generator.random() < 0.5 else -1)
        if generator.random() < 0.5:
            image = operation(image, level, fill)
    return image
