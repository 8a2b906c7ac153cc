"""Labeled images of any origin: whatever has a length, and items of an image and its class."""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.read import ImageSource, source_name
from dpn_jax.images.records import ImageBytes
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing


class LabeledImages(Protocol):
    """An `ImageFolder`, `PackedImages`, a Hugging Face `datasets.Dataset`, a list, ...

    An item is a pair of an image, as `read_image` accepts it, and its class, an integer from 0; or a mapping with these
    under 'image' and 'label'. Worker processes need a source that can be pickled.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[ImageSource, int] | Mapping[str, Any]: ...


def labeled_image(source: LabeledImages, index: int) -> tuple[ImageSource, int]:
    """An item of any source as a pair.

    Raises:
      ImageError: the source fails, or the item is not an image and its class; the message names the item.

    Example:
      >>> labeled_image([("cat.jpg", 0), {"image": "dog.jpg", "label": 1}], 1)
      ('dog.jpg', 1)
      >>> labeled_image(["cat.jpg"], 0)
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: item 0: expected an image and its label, got str
    """
    try:
        item = source[index]
    except ImageError:
        raise
    except Exception as error:  # a source may decode images, and Pillow raises nearly every built-in exception
        raise ImageError(f"item {index}: {reason(error)}") from error
    if isinstance(item, Mapping) and {"image", "label"} <= item.keys():
        image, label = item["image"], item["label"]
    elif isinstance(item, tuple | list) and len(item) == 2:
        image, label = item
    else:
        raise ImageError(f"item {index}: expected an image and its label, got {type(item).__name__}")
    try:
        label = operator.index(label)
    except TypeError:
        label = -1
    if label < 0:
        raise ImageError(f"item {index}: its label must be the index of a class, from 0")
    return ImageBytes(image, f"item {index}") if type(image) is bytes else image, label


def prepared(source: LabeledImages, index: int, prepare: Callable[[ImageSource], np.ndarray]) -> tuple[np.ndarray, int]:
    """An item of any source, its image prepared.

    Args:
      source: the images.
      index: which one.
      prepare: such as `Transform.crop`.

    Raises:
      ImageError: as `labeled_image` and `prepare`; the message names the image, or the item if that has no name.

    Example:
      >>> transform = Transform(Preprocessing(image_size=32))
      >>> prepared([(np.zeros((40, 40, 3), np.uint8), 7)], 0, transform.crop)[0].shape
      (32, 32, 3)
    """
    image, label = labeled_image(source, index)
    try:
        return prepare(image), label
    except ImageError as error:
        if isinstance(image, str | os.PathLike | ImageBytes):
            raise
        raise ImageError(f"item {index}: {str(error).removeprefix(f'{source_name(image)}: ')}") from error


class AsCropped(Transform):
    """The transform of images that are cropped already."""

    def crop(self, source: np.ndarray) -> np.ndarray:
        """The image as it is, uint8 [H, W, C]."""
        return source


def transform_for(source: LabeledImages, preprocessing: Preprocessing) -> Transform:
    """The transform of a source's images: crops that are packed stay as they are.

    Raises:
      ImageError: its crops have another geometry.
      ValueError: `preprocessing` has neither one nor three channels.

    Example:
      >>> type(transform_for([("cat.jpg", 0)], Preprocessing()))
      <class 'dpn_jax.images.transform.Transform'>
    """
    transform = Transform(preprocessing)
    return AsCropped(preprocessing) if are_crops(source, transform) else transform


def are_crops(source: LabeledImages, transform: Transform) -> bool:
    """Whether a source has packed crops, and checks that they are what a transform would make.

    Raises:
      ImageError: its crops have another geometry, or were made without the EXIF orientation that is asked for.

    Example:
      >>> are_crops([("cat.jpg", 0)], Transform(Preprocessing()))
      False
    """
    packed = source if isinstance(source, PackedImages) else getattr(source, "packed", None)
    if packed is None or packed.preprocessing is None:
        return False
    packed.check_geometry(transform.preprocessing)
    if transform.exif:
        raise ImageError(
            f"{shown(packed.folder)}: its crops were made without the EXIF orientation; go without --exif (exif=True), "
            "or pack the photos without --crops"
        )
    return True


class Unlabeled(Sequence[ImageSource | ImageError]):
    """The images of a source alone, as `Classifier.stream` takes them; for an item that cannot be read, why.

    Args:
      source: the images.

    Attributes:
      labels: classes of the items that have been asked for, by index.

    Example:
      >>> images = Unlabeled([("cat.jpg", 0), None])
      >>> list(images), images.labels
      (['cat.jpg', ImageError('item 1: expected an image and its label, got NoneType')], {0: 0})
    """

    def __init__(self, source: LabeledImages) -> None:
        self.source = source
        self.labels: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageSource | ImageError:
        index = range(len(self))[index]
        try:
            image, self.labels[index] = labeled_image(self.source, index)
        except ImageError as error:
            return error
        return image
