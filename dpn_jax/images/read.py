"""Reads one image, EXIF orientation included, as timm does, or says in one line why it cannot."""

import importlib.util
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.paths import opened, readable_path

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""The most pixels of an image, as read or resized: 89,478,485, above which Pillow warns by default."""
MAX_BYTES = 2**30
"""The most bytes that are read from a file object, which may have no end: more than `MAX_PIXELS` of any format need."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
if importlib.util.find_spec("PIL._avif"):  # Pillow 11.3 is the first that can be built with it
    FORMATS += ("AVIF",)
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".avif", ".avifs"}
)
UNSUPPORTED_SUFFIXES = {".jxl": "JPEG XL", ".heic": "HEIC", ".heif": "HEIF", ".hif": "HEIF"}
"""Suffixes of image formats that Pillow cannot read, and their names."""
_UNSUPPORTED_STARTS = {b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL"}
_UNSUPPORTED_BRANDS = {  # bytes 8 to 12 of a file whose bytes 4 to 8 are "ftyp" (ISO/IEC 23008-12)
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
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

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray
"""A path, the content of a file, a file opened in binary mode, a PIL image, or a uint8 array."""


def read_image(
    source: ImageSource, *, exif: bool = False, mode: str = "RGB", at_least: int | None = None
) -> Image.Image:
    """Reads one image, as timm does: `PIL.Image.open(source).convert("RGB")`.

    Other modes are converted as Pillow does it: alpha is dropped (not blended), CMYK is converted without its color
    profile, and 16-bit gray is clipped at 255, which leaves most such images white. Only the first frame of a file is
    read. Truncated files are refused.

    Args:
      source: the path, also in a bucket ('gs://bucket/photo.jpg'), of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF
        file (where Pillow has that), whatever its suffix; the content of such a file, as bytes, a bytearray or a
        memoryview; a file object opened in binary mode, which is read from where it stands to its end, and left open; a
        PIL image, which is not modified; or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. At most
        `MAX_PIXELS` pixels, and `MAX_BYTES` of a file object or of a bucket's file.
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
        return _decode(_file(source), exif, mode, at_least)
    except Exception as error:  # on damaged files Pillow raises nearly every built-in exception
        raise ImageError(f"{source_name(source)}: {reason(error)}") from error


def source_name(source: object) -> str:
    """How a message names an image: its path, or its type."""
    if isinstance(source, str | os.PathLike):
        return shown(source)
    is_pil = isinstance(source, Image.Image)
    name = getattr(source, "filename" if is_pil else "name", None)  # of a file object it may be a number
    return shown(name) if name and isinstance(name, str | bytes) else "PIL image" if is_pil else type(source).__name__


def _file(source: ImageSource) -> Path | io.BytesIO:
    """What Pillow opens; neither a file without an end nor one with nothing in it."""
    if isinstance(source, str | os.PathLike):
        path = readable_path(source)
        if not isinstance(path, Path):
            with opened(path) as remote:
                return _file(remote)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError("is a folder, not an image; list its images with image_files")
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer, and /dev/zero has no end
            raise ValueError("is not a regular file")
        file, size = path, status.st_size
    elif isinstance(source, bytes | bytearray | memoryview):
        file, size = io.BytesIO(source), memoryview(source).nbytes
    elif hasattr(source, "read"):
        file = io.BytesIO()
        while chunk := source.read(2**20):
            file.write(chunk)
            if file.tell() > MAX_BYTES:
                raise ValueError(f"has more than the {MAX_BYTES:,} bytes allowed")
        size = file.tell()
    else:
        raise ValueError(
            f"expected a path, bytes, a binary file object, a PIL image or a NumPy array, got {type(source).__name__}"
        )
    if size == 0:
        raise ValueError("the file is empty (0 bytes)")
    return file


def _decode(file: Path | io.BytesIO, exif: bool, mode: str, at_least: int | None) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("refused while Pillow's LOAD_TRUNCATED_IMAGES is set: it fills missing pixels with gray")
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(_unidentified(file)) from error
    with opened as image:
        _check_size(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # does nothing for other formats
        image.load()
        return _convert(image, exif, mode)


def _unidentified(file: Path | io.BytesIO) -> str:
    """Why Pillow knows no format for a file."""
    with file.open("rb") if isinstance(file, Path) else file as stream:
        stream.seek(0)
        start = stream.read(12)
    kind = _UNSUPPORTED_BRANDS.get(start[8:]) if start[4:8] == b"ftyp" else None
    kind = kind or next((kind for mark, kind in _UNSUPPORTED_STARTS.items() if start.startswith(mark)), None)
    kind = kind or (UNSUPPORTED_SUFFIXES.get(file.suffix.lower()) if isinstance(file, Path) else None)
    if kind and kind not in FORMATS:
        return f"is {kind}, which this Pillow cannot read; convert it to JPEG or PNG"
    return f"not an image, or damaged: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} header could be read"


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
