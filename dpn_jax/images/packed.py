"""Reads a packed folder: photos or crops, by index, from ArrayRecord shards."""

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.images.records import MANIFEST, PLAN, ImageBytes, Manifest, Record, array_record
from dpn_jax.paths import absolute, forget, kind, readable_path, size
from dpn_jax.pretrained import Preprocessing


def is_packed(folder: str | os.PathLike) -> bool:
    """Whether a folder is one that `dpn-jax pack` has written, or has begun to write.

    Example:
      >>> is_packed("no-such-folder")
      False
    """
    folder = readable_path(folder)
    forget(folder)
    return kind(folder / PLAN) == "file" or (kind(folder / MANIFEST) == "file" and any(folder.glob("*.array_record")))


class _Part(NamedTuple):
    """All records of a shard, as array_record wants to be told of them: it then opens no file before one is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class PackedImages(Sequence[tuple[bytes | np.ndarray, int]]):
    """The images of a packed folder, read record by record; picklable, and safe in threads.

    Args:
      folder: what `dpn-jax pack` has written, here or in a bucket ('gs://bucket/packed').

    Attributes:
      folder: its path.
      class_names: names of the classes.
      preprocessing: None if the photos' own files are packed; otherwise the preprocessing whose geometry the crops
        have, which are not normalized.
      files: path of each image, as if it lay unpacked in `folder`.
      labels: class of each image, its index in `class_names`.
      broken: the reason for each image that could not be packed.

    Raises:
      ImageError: the manifest is missing, damaged or of another version, or array_record is not installed.

    Example:
      >>> PackedImages("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no packed images (no manifest.json in it)
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        folder = readable_path(folder, error=ImageError)
        self.folder = absolute(folder)
        manifest = Manifest.read(folder)
        self.class_names = manifest.class_names
        self.preprocessing = manifest.preprocessing
        self.broken = manifest.broken
        self.labels = tuple(label for shard in manifest.shards for label in shard.labels)
        self.files = tuple(str(self.folder / name) for shard in manifest.shards for name in shard.names)
        self._shards = [(shard.file, shard.size) for shard in manifest.shards]
        self._ends = list(itertools.accumulate(len(shard.names) for shard in manifest.shards))
        parts = [
            _Part(str(self.folder / shard.file), 0, len(shard.names), len(shard.names)) for shard in manifest.shards
        ]
        self._records = array_record().data_source(parts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """The image and its class.

        Returns:
          The bytes of a photo's file, or a crop, uint8 [H, W, C]; and its index in `class_names`.

        Raises:
          ImageError: the record cannot be read; the message names the shard, the record and the image.
        """
        index = range(len(self))[index]
        try:
            return self._image(index, self._records[index]), self.labels[index]
        except (RuntimeError, ValueError) as error:
            raise ImageError(f"{self._name(index)}: {self._why(index, error)}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[bytes | np.ndarray, int]]:
        """Several images at once, in parallel reads: what a file system with a long latency wants.

        Raises:
          ImageError: as for one.
        """
        try:
            found = self._records.__getitems__(indices)
            return [
                (self._image(index, record), self.labels[index]) for index, record in zip(indices, found, strict=True)
            ]
        except (RuntimeError, ValueError):
            return [self[index] for index in indices]  # raises, and says which

    def image(self, file: str) -> bytes | np.ndarray:
        """The image of one of `files`.

        Raises:
          ImageError: there is none of this name, or its record cannot be read.
        """
        if file not in self._indices:
            raise ImageError(f"{shown(file)}: not in the packed folder")
        return self[self._indices[file]][0]

    def check_geometry(self, wanted: Preprocessing) -> None:
        """Checks that crops are those that a model needs.

        Args:
          wanted: the preprocessing of the model.

        Raises:
          ImageError: they have another size, were resized or cropped otherwise, or have other channels.
        """
        given, needed = (_geometry(settings) for settings in (self.preprocessing, wanted))
        if different := [name for name in given if given[name] != needed[name]]:
            sides = (", ".join(f"{name} {values[name]}" for name in different) for values in (given, needed))
            raise ImageError(
                "{}: its crops have {}, but {} is needed; pack the photos again with the --model and --image-size of "
                "the weights, or without --crops".format(shown(self.folder), *sides)
            )

    @functools.cached_property
    def identity(self) -> bytes:
        """Names and classes of the images, in their order."""
        return identity(self.files, self.labels)

    @functools.cached_property
    def _indices(self) -> Mapping[str, int]:
        return {file: index for index, file in enumerate(self.files)}

    def _image(self, index: int, content: bytes) -> bytes | np.ndarray:
        record = Record.from_bytes(content)
        if str(self.folder / record.name) != self.files[index]:
            raise ValueError(f"holds {shown(record.name)} instead; run the same dpn-jax pack again")
        if isinstance(record.image, np.ndarray) != (self.preprocessing is not None):
            raise ValueError("holds a crop among files, or a file among crops; run the same dpn-jax pack again")
        return record.image if self.preprocessing else ImageBytes(record.image, self._name(index))

    def _place(self, index: int) -> tuple[int, int]:
        """Number of an image's shard, and of its record in it."""
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _name(self, index: int) -> str:
        """How messages name an image."""
        shard, number = self._place(index)
        name = readable_path(self.files[index]).relative_to(self.folder)
        return f"{shown(self.folder / self._shards[shard][0])}: record {number} ({shown(name)})"

    def _why(self, index: int, error: Exception) -> str:
        """Why a record could not be read."""
        file, expected = self._shards[self._place(index)[0]]
        try:
            found = size(self.folder / file)
        except OSError as missing:
            return reason(missing)
        if found < expected:
            return f"the shard is truncated: {found:,} of {expected:,} bytes"
        return reason(error) if type(error) is ValueError else f"damaged ({reason(error)})"


def identity(files: Sequence[str], labels: Sequence[int]) -> bytes:
    r"""Names and classes of images, in their order; where they are makes no difference.

    Example:
      >>> identity(["cats/1.png"], [0])
      b'0/1.png\x00'
    """
    return b"".join(
        b"%d/%s\0" % (label, os.fsencode(Path(file).name)) for file, label in zip(files, labels, strict=True)
    )


def _geometry(settings: Preprocessing) -> dict[str, object]:
    """What crops depend on."""
    fields = dataclasses.asdict(settings)
    border = fields["mean"] if settings.crop_mode == "border" else None
    names = ("image_size", "crop_fraction", "interpolation", "crop_mode")
    return {name: fields[name] for name in names} | {"channels": len(settings.mean), "border color": border}
