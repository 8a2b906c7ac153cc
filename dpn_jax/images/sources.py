"""Labeled images of any origin: whatever has a length, and items of an image and its class."""

import operator
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from dpn_jax.errors import ImageError, reason
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
    return image, label


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


def transform_for(source: LabeledImages, preprocessing: Preprocessing, *, exif: bool = False) -> Transform:
    """The transform of a source's images: crops that are packed stay as they are.

    Args:
      source: the images.
      preprocessing: how they are to be prepared.
      exif: apply the EXIF orientation of photos; crops have none.

    Raises:
      ImageError: its crops have another geometry.
      ValueError: `preprocessing` has neither one nor three channels.

    Example:
      >>> type(transform_for([("cat.jpg", 0)], Preprocessing()))
      <class 'dpn_jax.images.transform.Transform'>
    """
    packed = source if isinstance(source, PackedImages) else getattr(source, "packed", None)
    if packed is None or packed.preprocessing is None:
        return Transform(preprocessing, exif=exif)
    packed.check_geometry(preprocessing)
    return AsCropped(preprocessing)
