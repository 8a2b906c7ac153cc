"""The format of packed images: ArrayRecord shards of photos or of crops, and the manifest that lists them.

A packed folder holds `00000-of-00008.array_record`, ..., and `manifest.json`. A record is a header (`_HEADER`, little
endian), the image's name in UTF-8, and the bytes of its file, or its pixels, row by row. Nothing in it is executed.
"""

import dataclasses
import itertools
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.paths import kind, read_bytes
from dpn_jax.pretrained import Preprocessing

FORMAT = 1
"""Version of the records and of the manifest."""
MANIFEST = "manifest.json"
PLAN = ".packing.json"
"""What is to be packed; there until the manifest is."""

_MAGIC = b"DPN" + bytes([FORMAT])
_HEADER = struct.Struct("<4siIIQHBx")
"""Magic and version; label; height and width of a crop; bytes of the file and of the name; channels, 0 for a file."""


class ImageBytes(bytes):
    """The content of an image's file, and the name that messages give it."""

    name: str
    """What messages call it."""

    def __new__(cls, content: bytes, name: str) -> Self:
        """`bytes.__new__` takes no name."""
        self = super().__new__(cls, content)
        self.name = name
        return self

    def __getnewargs__(self) -> tuple[bytes, str]:
        return bytes(self), self.name


class Record(NamedTuple):
    """An image as it is packed.

    Example:
      >>> record = Record(1, "cat/1.png", 1234, np.zeros((2, 3, 1), np.uint8))
      >>> Record.from_bytes(record.to_bytes()).image.shape
      (2, 3, 1)
    """

    label: int
    """Class, an index of the manifest's names."""
    name: str
    """Path below the folder it came from."""
    size: int
    """Bytes of the file it came from."""
    image: bytes | np.ndarray
    """The content of its file, or a crop, uint8 `[H, W, C]`."""

    def to_bytes(self) -> bytes:
        """The record in a shard."""
        name = os.fsencode(self.name)
        is_crop = isinstance(self.image, np.ndarray)
        height, width, channels = self.image.shape if is_crop else (0, 0, 0)
        header = _HEADER.pack(_MAGIC, self.label, height, width, self.size, len(name), channels)
        return header + name + (self.image.tobytes() if is_crop else self.image)

    @classmethod
    def from_bytes(cls, record: bytes) -> Self:
        """The record from a shard.

        Raises:
          ValueError: it is none of this version, or not whole.
        """
        if len(record) < _HEADER.size or not record.startswith(_MAGIC):
            raise ValueError(f"not a record of format {FORMAT}")
        _, label, height, width, size, name_length, channels = _HEADER.unpack_from(record)
        start = _HEADER.size + name_length
        name, image = os.fsdecode(record[_HEADER.size : start]), record[start:]
        if len(image) != (height * width * channels if channels else size):
            raise ValueError("a record that is not whole")
        if channels:
            image = np.frombuffer(image, np.uint8).reshape(height, width, channels)
        return cls(label, name, size, image)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records."""

    file: str
    """Its name in the packed folder."""
    size: int
    """Bytes."""
    names: tuple[str, ...]
    """Names of its images, in their order."""
    labels: tuple[int, ...]
    """Their classes."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a packed folder."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing | None
    """The geometry of the crops; None where files are packed as they are."""
    shards: tuple[Shard, ...]
    broken: Mapping[str, str]
    """The reason for each image that could not be read, and is not packed."""
    plan: Mapping[str, Any]
    """What was asked for; a pack of something else does not go into the same folder."""

    def to_json(self) -> str:
        """The content of `manifest.json`."""
        from dpn_jax import __version__

        shards = [
            {
                "file": shard.file,
                "size": shard.size,
                "images": [
                    [label, [name for _, name in run]]  # one list of names for images of one class in a row
                    for label, run in itertools.groupby(
                        zip(shard.labels, shard.names, strict=True), key=lambda pair: pair[0]
                    )
                ],
            }
            for shard in self.shards
        ]
        fields = {"format": FORMAT, "dpn_jax": __version__} | dataclasses.asdict(self) | {"shards": shards}
        return json.dumps(fields, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the manifest of a packed folder.

        Raises:
          ImageError: there is none, or it is damaged or of another version.
        """
        path = folder / MANIFEST
        try:
            fields = json.loads(read_bytes(path).decode("utf-8"))
            if fields["format"] != FORMAT:
                raise ImageError(
                    f"{shown(path)}: format {fields['format']!r}, but this dpn_jax reads format {FORMAT}; pack the "
                    "images again, or install the dpn_jax that packed them"
                )
            if not fields["shards"]:
                raise ValueError("no shards")
            settings = fields["preprocessing"]
            return cls(
                class_names=tuple(fields["class_names"]),
                preprocessing=None if settings is None else Preprocessing(**settings),
                shards=tuple(_shard(shard, len(fields["class_names"])) for shard in fields["shards"]),
                broken=fields["broken"],
                plan=fields["plan"],
            )
        except ImageError:
            raise
        except FileNotFoundError:
            unfinished = "has not been packed to its end; run the same dpn-jax pack again"
            why = unfinished if kind(folder / PLAN) else f"no packed images (no {MANIFEST} in it)"
            raise ImageError(f"{shown(folder)}: {why}") from None
        except OSError as error:
            raise ImageError(f"{shown(path)}: cannot be read ({reason(error)})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{shown(path)}: damaged ({reason(error)}); run the same dpn-jax pack again") from error


def _shard(fields: Mapping[str, Any], classes: int) -> Shard:
    pairs = [(name, label) for label, names in fields["images"] for name in names]
    names, labels = zip(*pairs, strict=True)
    if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise ValueError(f"a class that is not one of {classes}")
    if Path(fields["file"]).name != fields["file"]:
        raise ValueError(f"{fields['file']!r} is not the name of a shard")
    return Shard(fields["file"], int(fields["size"]), names, labels)


class _ArrayRecord(NamedTuple):
    """What is used of array_record."""

    data_source: type
    writer: type
    reader: type


def array_record() -> _ArrayRecord:
    """array_record's classes, which come with Grain.

    Raises:
      ImageError: it is not installed.
    """
    try:
        from array_record.python import array_record_data_source, array_record_module
    except ImportError as error:
        raise ImageError(
            f'packed images need array_record ({reason(error)}): pip install "dpn-jax[finetune]"'
        ) from error
    return _ArrayRecord(
        array_record_data_source.ArrayRecordDataSource,
        array_record_module.ArrayRecordWriter,
        array_record_module.ArrayRecordReader,
    )
