"""A map over its photo, to be looked at."""

import jax
import numpy as np
from PIL import Image

from dpn_jax.explain.forward import sampling
from dpn_jax.images.read import ImageSource, read_image
from dpn_jax.images.transform import Transform


def overlay(
    image: ImageSource,
    map: jax.Array | np.ndarray,
    *,
    transform: Transform | None = None,
    opacity: float = 0.6,
    color_map: str = "inferno",
) -> Image.Image:
    """A photo with a map over it, each pixel where it was in the network's input.

    The map is divided by its largest value and what is negative is not shown (`overlay(image, -map)` shows that). A map
    without a positive value leaves the photo as it is.

    Args:
      image: what `Transform` accepts.
      map: `[H, W]`, one image's, of any scale.
      transform: how the network's input was made from the image: the map lies over the part that it cropped. Defaults
        to the whole image, as for `transform.crop(image)`.
      opacity: of the largest value, in [0, 1].
      color_map: a name of matplotlib's; the perceptually uniform ones are viridis, plasma, inferno, magma, cividis.

    Returns:
      RGB, of the size of the photo.

    Raises:
      ImageError: the image cannot be read.
      ValueError: the map is not `[H, W]` or not finite, or another argument does not fit.
      ImportError: matplotlib is missing.

    Example:
      >>> import numpy as np
      >>> overlay(np.zeros((30, 40, 3), np.uint8), np.eye(8)).size
      (40, 30)
    """
    values = np.asarray(map, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"map must be finite numbers [H, W], one image's, got {list(values.shape)}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity!r}")
    photo = read_image(image, exif=transform is not None and transform.exif)
    left, top, right, bottom = (0, 0, photo.width, photo.height)
    if transform is not None:
        left, top, right, bottom = transform.region(photo.width, photo.height)
    rows, seen_rows = _sampled(photo.height, top, bottom, values.shape[0])
    columns, seen_columns = _sampled(photo.width, left, right, values.shape[1])
    values = np.maximum(rows @ values @ columns.T, 0)
    values /= values.max() or 1
    colors = _colors(color_map)[np.rint(255 * values).astype(np.uint8)]
    # what is weak is transparent, so that a zero map shows the photo
    alpha = (opacity * np.sqrt(values) * np.outer(seen_rows, seen_columns))[..., None]
    pixels = np.asarray(photo, np.float64)
    return Image.fromarray(np.rint(pixels + alpha * (colors - pixels)).astype(np.uint8))


def _sampled(pixels: int, start: float, end: float, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel's center which samples it mixes, and whether it lies between start and end."""
    centers = np.arange(pixels) + 0.5
    positions = (centers - start) * samples / (end - start) - 0.5
    return sampling(samples, positions), (centers > start) & (centers < end)


def _colors(name: str) -> np.ndarray:
    """float64 [256, 3], 0 to 255."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("overlay needs matplotlib: pip install 'dpn-jax[explain]'") from error
    if name not in matplotlib.colormaps:
        raise ValueError(f"color_map must be a name of matplotlib's, such as 'inferno', got {name!r}")
    return 255 * matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
