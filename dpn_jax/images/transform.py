"""Images into what the network reads, as timm prepares them, and the names of the classes (Pillow and NumPy only)."""

import dataclasses
import functools
import importlib.resources
import math
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from dpn_jax.config import PRETRAINED, Preprocessing, unknown_name_message

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""The most pixels of an image, as read or as resized: 89,478,485, Pillow's own limit before it warns."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split()  # noqa: SIM905
)

ImageSource = str | os.PathLike | Image.Image | np.ndarray

_MODES = {1: "L", 3: "RGB"}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
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


class ImageError(ValueError):
    """An image that cannot be read or prepared; its message is one printable line that names the file."""


def read_image(
    source: ImageSource, *, exif: bool = False, mode: str = "RGB", at_least: int | None = None
) -> Image.Image:
    """Reads one image, as timm does: `PIL.Image.open(source).convert("RGB")`, or fails with one kind of error.

    Pillow's conversion decides what becomes of other modes, sensible or not: alpha is dropped (not blended), CMYK is
    converted without its colour profile, and 16-bit grey is clipped at 255, which leaves most such images white. Only
    the first frame of a file is read. Truncated files are refused.

    Args:
      source: the path of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file, whatever its suffix; a PIL image, which stays
        as it is; or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. At most `MAX_PIXELS` pixels.
      exif: turn the image as its EXIF orientation says. timm does not, hence False; EXIF data that cannot be read are
        ignored. (Pillow itself always turns TIFF files.)
      mode: 'RGB', or 'L' for one channel of grey.
      at_least: decode JPEG files at 1/2, 1/4 or 1/8 of their size where the shorter side keeps so many pixels: several
        times faster for photos, and not the same pixels; left out, at full size.

    Returns:
      A new, decoded image of that mode.

    Raises:
      ImageError: the image is missing, damaged, too large or of another format; the message names it and says why.

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
    except Exception as error:  # Pillow raises nearly every built-in exception on one damaged file or another
        raise ImageError(f"{_name(source)}: {_reason(error)}") from error


def _read_file(path: Path, exif: bool, mode: str, at_least: int | None) -> Image.Image:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a folder, not an image; list its images with image_files")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for its writer, and /dev/zero has no end
        raise ValueError("is not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("refused while Pillow's LOAD_TRUNCATED_IMAGES is set: it fills what is missing with grey")
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
    turn = _orientation(image) if exif else None
    return converted if turn is None else converted.transpose(turn)


def _check_size(image: Image.Image) -> None:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if min(image.size) < 1:
        raise ValueError(f"the image has no pixels, its size is {image.width} x {image.height}")
    if image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than the {limit:,} allowed; shrink the image")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG))
    except Exception:  # damaged EXIF data fail in as many ways as damaged images, and the pixels do not need them
        return None


def _name(source: object) -> str:
    """What a message calls `source`: printable, in one line."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "") or "PIL image"
    if not isinstance(source, str | bytes | os.PathLike):
        return type(source).__name__
    name = os.fsdecode(source)
    return name if name.isprintable() else repr(name)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or damaged: no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} header could be read"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if reason.isprintable() else repr(reason)


@dataclasses.dataclass(frozen=True)
class Transform:
    """Prepares images for a set of weights, equal to timm's transform for evaluation.

    The shorter side is resized to `floor(image_size / crop_fraction)`, the centre is cropped, and the values are scaled
    to [0, 1] and normalised. The pixels before normalisation and the floats after it are the same bits as timm's.

    Args:
      preprocessing: sizes, interpolation, mean and deviation; with one channel of mean, images are read as grey ('L').
      exif: turn images as their EXIF orientation says; timm does not.

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

    def __post_init__(self) -> None:
        if len(self.preprocessing.mean) not in _MODES:
            raise ValueError(
                f"preprocessing must have 3 channels (RGB) or 1 (grey), got mean={self.preprocessing.mean!r}"
            )

    def __call__(self, source: ImageSource) -> np.ndarray:
        """Reads, resizes, crops and normalises one image.

        Args:
          source: what `read_image` accepts.

        Returns:
          float32 [image_size, image_size, C], C as in `preprocessing.mean`.

        Raises:
          ImageError: as `crop`.
        """
        return self.normalize(self.crop(source))

    def crop(self, source: ImageSource) -> np.ndarray:
        """Reads, resizes and crops one image: all but the normalisation.

        Args:
          source: what `read_image` accepts.

        Returns:
          uint8 [image_size, image_size, C].

        Raises:
          ImageError: `read_image` fails, or the image is so narrow that it would have more than `MAX_PIXELS` pixels
            when its shorter side is resized (at 256 pixels: beyond about 1 : 1365). timm does it, in gigabytes.
        """
        settings = self.preprocessing
        image = read_image(source, exif=self.exif, mode=_MODES[len(settings.mean)])
        short = math.floor(settings.image_size / settings.crop_fraction)
        # Truncated, not rounded: torchvision.transforms.functional._compute_resized_output_size
        width, height = (int(short * side / min(image.size)) for side in image.size)
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{_name(source)}: {image.width} x {image.height} pixels would be resized to {width} x {height}, "
                f"more than the {MAX_PIXELS:,} pixels allowed; crop the image first"
            )
        image = image.resize((width, height), _FILTERS[settings.interpolation])
        # Halves round to even, as in torchvision's center_crop. Its padding is never needed, as crop_fraction <= 1.
        left, top = (round((side - settings.image_size) / 2) for side in image.size)
        pixels = np.array(image.crop((left, top, left + settings.image_size, top + settings.image_size)))
        return pixels.reshape(*pixels.shape[:2], -1)

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


def preprocessing(
    source: str | Preprocessing, *, use_test_size: bool = False, image_size: int | None = None, exif: bool = False
) -> Transform:
    """The transform that a set of weights was evaluated with.

    Args:
      source: a pretrained tag, with or without 'timm/' before it, or a `Preprocessing`.
      use_test_size: take the larger images that timm tests some weights with (`dpn68b.ra_in1k`), where there are any.
      image_size: side of the prepared images instead of the weights' own, pixels, at least 32; `crop_fraction` stays.
      exif: turn images as their EXIF orientation says; timm does not.

    Returns:
      A transform from a path, PIL image or uint8 array to float32 [H, W, 3].

    Raises:
      ValueError: the tag is not known (a bare variant is none: the weights decide), or an argument is out of range.

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
            raise ValueError(unknown_name_message(source, PRETRAINED))
        settings = (use_test_size and tag.test_preprocessing) or tag.preprocessing
    if image_size is not None:
        settings = dataclasses.replace(settings, image_size=image_size)
    return Transform(settings, exif=exif)


class Label(NamedTuple):
    """A class of ImageNet: its WordNet synset, such as 'n01440764', and its name, such as 'tench, Tinca tinca'."""

    synset: str
    name: str


@functools.cache
def imagenet_labels() -> tuple[Label, ...]:
    """The 1000 classes of ImageNet-1k, in the order of the published weights' logits.

    Example:
      >>> imagenet_labels()[0]
      Label(synset='n01440764', name='tench, Tinca tinca')

    Source: `timm.data.ImageNetInfo`.
    """
    text = importlib.resources.files("dpn_jax.images").joinpath("imagenet1k.txt").read_text(encoding="utf-8")
    return tuple(Label(*line.split("\t")) for line in text.splitlines())


def read_labels(path: str | os.PathLike, num_classes: int) -> tuple[str, ...]:
    """Reads the names of a model's classes from a text file.

    Args:
      path: a UTF-8 file, one name a line, in the order of the logits; empty lines at its end do not count.
      num_classes: how many names there must be.

    Returns:
      The names, without surrounding white space.

    Raises:
      ValueError: the file is missing, not UTF-8 text, or has another number of names; the message names it.

    Example:
      >>> read_labels("no-such-file.txt", 2)
      Traceback (most recent call last):
      ValueError: no-such-file.txt: no such label file
    """
    name = _name(path)
    if not Path(path).is_file():
        raise ValueError(f"{name}: no such label file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: label file cannot be read as UTF-8 text: {_reason(error)}") from error
    labels = tuple(line.strip() for line in text.split("\n")) if text else ()
    if len(labels) != num_classes:
        raise ValueError(
            f"{name}: label file has {len(labels)} labels, one a line, but the model has {num_classes} classes"
        )
    return labels


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Lists the images in a folder and its subfolders by their suffixes, in either case; nothing is opened.

    Args:
      folder: where to look. Symbolic links are followed, as timm does, except into a folder that they lie in.

    Returns:
      Paths that begin with `folder`, sorted.

    Raises:
      ImageError: `folder` or a folder in it cannot be listed.

    Example:
      >>> image_files("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.images.transform.ImageError: no-such-folder: No such file or directory
    """
    files = []
    pending = [(Path(folder), frozenset[Path]())]
    while pending:
        directory, above = pending.pop()
        try:
            real = directory.resolve()
            if real in above:
                continue
            for entry in directory.iterdir():
                if entry.is_dir():
                    pending.append((entry, above | {real}))
                elif entry.suffix.lower() in SUFFIXES:
                    files.append(entry)
        except OSError as error:
            raise ImageError(f"{_name(directory)}: {_reason(error)}") from error
    return sorted(files)
