"""Writes CIFAR-10 as a folder of class folders: `python -m recipes.cifar10_folder cifar10`.

60,000 photos of 32x32 pixels in ten classes (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
2009): `train/<class>/`, `val/<class>/`, which is the last fifth of each class's training photos, and `test/<class>/`.
"""

import collections
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import tyro

SUFFIXES = {".jpg", ".jpeg", ".png"}


class Photo(NamedTuple):
    """A photo of the source."""

    split: str
    """'train' or 'test'."""
    class_name: str
    file: str
    content: Callable[[], bytes]
    """Reads it."""


def main(folder: tyro.conf.Positional[Path], /, *, archive: Path | None = None, hub: str = "uoft-cs/cifar10") -> None:
    """Write the photos.

    Args:
      folder: the folder to make; it must not exist.
      archive: a zip file of `train/<class>/*` and `test/<class>/*`, in any folder, whose files are copied as they are.
      hub: without an archive, the dataset on the Hugging Face hub, written as PNG; needs `datasets`.
    """
    folder.mkdir(parents=True)
    found: dict[tuple[str, str], list[Photo]] = collections.defaultdict(list)
    for photo in from_hub(hub) if archive is None else from_archive(archive):
        found[photo.split, photo.class_name].append(photo)
    for (split, class_name), photos in found.items():
        photos.sort(key=lambda photo: photo.file)
        kept = len(photos) - len(photos) // 5 if split == "train" else len(photos)
        for index, photo in enumerate(photos):
            path = folder / (split if index < kept else "val") / class_name / photo.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo.content())
    print(f"{folder.name}: {sum(map(len, found.values()))} photos")


def from_archive(archive: Path) -> Iterator[Photo]:
    """The photos of a zip file."""
    file = zipfile.ZipFile(archive)
    for name in file.namelist():
        path = PurePosixPath(name)
        if path.suffix in SUFFIXES and len(path.parts) >= 3 and path.parts[-3] in ("train", "test"):
            yield Photo(*path.parts[-3:], lambda name=name: file.read(name))


def from_hub(name: str) -> Iterator[Photo]:
    """The photos of a dataset with the columns `img` and `label`."""
    import datasets

    for split, rows in datasets.load_dataset(name).items():
        labels = rows.features["label"]
        for index, label in enumerate(rows["label"]):
            yield Photo(
                split, labels.int2str(label), f"{index:05}.png", lambda rows=rows, index=index: png(rows, index)
            )


def png(rows: "datasets.Dataset", index: int) -> bytes:  # noqa: F821
    """One photo of a dataset, as a file."""
    file = io.BytesIO()
    rows[index]["img"].save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
