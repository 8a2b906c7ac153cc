"""Reads one image, EXIF orientation included, as timm does, or says in one line why it cannot."""

import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from dpn_jax.errors import ImageError, reason, shown

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""The most pixels of an image, as read or resized: 89,478,485, above which Pillow warns by default."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
UNSUPPORTED_SUFFIXES = frozenset({".heic", ".heif", ".jxl"})
"""Of photos that Pillow cannot read without plugins."""
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource = str | os.PathLike | Image.Image | np.ndarray


def read_image(
    source: ImageSource, *, exif: bool = False, mode: str = "RGB", at_least: int | None = None
) -> Image.Image:
    """Reads one image, as timm does: `PIL.Image.open(source).convert("RGB")`.

    Other modes are converted as Pillow does it: alpha is dropped (not blended), CMYK is converted without its color
    profile, and 16-bit gray is clipped at 255, which leaves most such images white. Only the first frame of a file is
    read. Truncated files are refused.

    Args:
      source: the path of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file, whatever its suffix; a PIL image, which is not
        modified; or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. At most `MAX_PIXELS` pixels.
      exif: apply the EXIF orientation; defaults to False, as in timm. EXIF data that cannot be read are ignored.
        (Pillow itself always applies the orientation of TIFF files.)
      mode: 'RGB', or 'L' for one channel of gray.
      at_least: decode JPEG files at the smallest of 1/8, 1/4 and 1/2 of their size that leaves this many pixels for the
        shorter side: several times faster for photos, but not the same pixels. Defaults to full size.

    Returns:
      A new, decoded image of that mode.

    Raises:
      ImageError: the image is missing, damaged, too large or of an unsupported format; the message names it and says
        why.

    Example:
      >>> read_image(np.zeros((2, 3), np.uint8))
      <PIL.Image.Image image mode=RGB size=3x2 at 0x...>

    Source: `timm.data.dataset.ImageDataset.__getitem__`.
    """
    try:
        if isinstance(source, Image.Image):
            return _convert(source, exif, mode)
        if isinstance(source, np.ndarray):
            return _convert(_from_array(source), exif, mode)
        if not isinstance(source, str | os.PathLike):
            raise ValueError(f"expected a path, a PIL image or a NumPy array, got {type(source).__name__}")
        return _read_file(Path(os.fsdecode(source)), exif, mode, at_least)
    except Exception as error:  # on damaged files Pillow raises nearly every built-in exception
        raise ImageError(f"{source_name(source)}: {_why(error)}") from error


def source_name(source: object) -> str:
    """How a message names an image: its path, or its type."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "") or "PIL image"
    return shown(source) if isinstance(source, str | bytes | os.PathLike) else type(source).__name__


def _read_file(path: Path, exif: bool, mode: str, at_least: int | None) -> Image.Image:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, not an image; list its images with image_files")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer, and /dev/zero has no end
        raise ValueError("is not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("refused while Pillow's LOAD_TRUNCATED_IMAGES is set: it fills missing pixels with gray")
    with Image.open(path, formats=FORMATS) as image:
        _check_size(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing for other formats
        image.load()
        return _convert(image, exif, mode)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ValueError(
            "expected a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of values from 0 to 255, "
            f"got {array.dtype} {list(array.shape)}"
        )
    if array.size == 0:
        raise ValueError(f"the image has no pixels, its shape is {list(array.shape)}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _convert(image: Image.Image, exif: bool, mode: str) -> Image.Image:
    _check_size(image)
    converted = image.convert(mode)
    orientation = _orientation(image) if exif else None
    return converted if orientation is None else converted.transpose(orientation)


def _check_size(image: Image.Image) -> None:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if min(image.size) < 1:
        raise ValueError(f"the image has no pixels, its size is {image.width} x {image.height}")
    if image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {limit:,} allowed; shrink the image")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # damaged EXIF data raise anything, and the pixels do not depend on them
        return None


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} header could be read"
    return reason(error)
