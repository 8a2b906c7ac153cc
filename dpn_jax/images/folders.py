"""Folders of images: one walk over class folders for training and evaluation, and the split of their images."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from dpn_jax.errors import DataError, ImageError, reason, shown
from dpn_jax.images.read import SUFFIXES

Split = Literal["train", "val", "all"]


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Lists the images in a folder and its subfolders by their suffixes, in either case; no image is opened.

    Args:
      folder: where to look. Symbolic links are followed, as in timm, except into a folder that contains them.

    Returns:
      Paths that begin with `folder`, sorted.

    Raises:
      ImageError: `folder` or a folder in it cannot be listed.

    Example:
      >>> image_files("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: No such file or directory
    """
    files = []
    pending = [(Path(folder), frozenset[Path]())]
    while pending:
        directory, ancestors = pending.pop()
        try:
            real = directory.resolve()
            if real in ancestors:
                continue
            for entry in directory.iterdir():
                if entry.is_dir():
                    pending.append((entry, ancestors | {real}))
                elif entry.suffix.lower() in SUFFIXES:
                    files.append(entry)
        except OSError as error:
            raise ImageError(f"{shown(directory)}: {reason(error)}") from error
    return sorted(files)


def class_folders(root: str | os.PathLike) -> dict[str, list[Path]]:
    """Lists the images of `root/<class>/**`, class by class; no image is opened.

    Args:
      root: the folder that holds one folder of images per class. Hidden folders (named '.*') and files beside the class
        folders are skipped; folders inside a class folder belong to its class.

    Returns:
      The images of each class, sorted, as paths that begin with `root`. The classes are in the natural order of their
      names: 2 before 10.

    Raises:
      ImageError: `root` is not a folder, it or a folder in it cannot be listed, it has no class folders, or a class has
        no images; the message names the folder.

    Example:
      >>> class_folders("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder

    Source: `timm.data.readers.reader_image_folder` and, for the order, `timm.data.readers.class_map.natural_key`.
    """
    root = Path(root)
    try:
        if not root.is_dir():
            raise ImageError(f"{shown(root)}: {'is not a folder' if root.exists() else 'no such folder'}")
        names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise ImageError(f"{shown(root)}: {reason(error)}") from error
    if not names:
        raise ImageError(f"{shown(root)}: no class folders; expected {shown(root / '<class>' / '<image>')}")
    classes = {name: image_files(root / name) for name in sorted(names, key=_natural_key)}
    for name, files in classes.items():
        if not files:
            raise ImageError(f"{shown(root / name)}: the class has no images; add some, or remove the folder")
    return classes


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images and their classes.

    Args:
      class_names: names of the classes, in the order of the logits.
      files: path of each image.
      labels: class of each image, its index in `class_names`.
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def without(self, files: Collection[str]) -> "ImageFolder":
        """The same without some of the files, such as those that `find_broken` found.

        Raises:
          DataError: a class would have no images left.

        Example:
          >>> ImageFolder(("cat", "dog"), ("a.png", "b.png", "c.png"), (0, 1, 1)).without(["b.png"]).files
          ('a.png', 'c.png')
        """
        files = frozenset(files)
        kept = [(file, label) for file, label in zip(self.files, self.labels, strict=True) if file not in files]
        for label in sorted(set(self.labels) - {label for _, label in kept}):
            raise DataError(f"class {self.class_names[label]!r}: none of its images can be read; add some that can")
        return ImageFolder(self.class_names, *(tuple(column) for column in zip(*kept, strict=True)))


def image_folder(path: str | os.PathLike, *, split: Split, val_fraction: float = 0.2, seed: int = 0) -> ImageFolder:
    """Lists the training or the validation images of a folder of class folders; no image is opened.

    With `path/train/<class>/*` and `path/val/<class>/*` these are the two splits. Otherwise `path/<class>/*` is split
    class by class, by a hash of the seed and each file's name, so that adding an image hardly moves any other.

    Args:
      path: the folder; `class_folders` says which folders and files count.
      split: 'train', 'val', or 'all' for every image of `path/<class>/*`.
      val_fraction: fraction of each class that is 'val', in [0, 1), at least one image and not all; 0 holds out none.
      seed: seed of the split.

    Returns:
      The images, class by class in the natural order of the class names (2 before 10). Bytes of a name that are not
      UTF-8 are written as `\\xff`.

    Raises:
      DataError: `class_folders` fails, there is only one class, a class has too few images to split, or train/ and val/
        do not have the same classes; the message names the folder.
      ValueError: `split` or `val_fraction` is out of range.

    Example:
      >>> image_folder("no-such-folder", split="train")
      Traceback (most recent call last):
      dpn_jax.errors.DataError: no-such-folder: no such folder
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split must be 'train', 'val' or 'all', got {split!r}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction!r}")
    root = Path(path)
    parts = [root / name for name in ("train", "val") if _holds_folders(root / name)]
    if not parts:
        classes = _two_or_more_classes(root)
        if split != "all":
            classes = {name: _split(root / name, files, split, val_fraction, seed) for name, files in classes.items()}
        if split == "val" and val_fraction == 0:
            raise DataError(f"{shown(root)}: val_fraction 0 leaves no images to validate with")
    elif len(parts) == 1:
        missing = {"train": "val", "val": "train"}[parts[0].name]
        raise DataError(f"{shown(root)}: has {parts[0].name}/ but no {missing}/; add it, or name {shown(parts[0])}")
    elif split == "all":
        raise DataError(f"{shown(root)}: has train/ and val/; name one of the two")
    else:
        train, val = (_two_or_more_classes(part) for part in parts)
        if difference := sorted(train.keys() ^ val.keys()):
            name = difference[0]
            raise DataError(
                f"{shown(root)}: train/ and val/ must have the same class folders, but {len(difference)} are in one "
                f"only, such as {shown(parts[name in val] / name)}"
            )
        classes = train if split == "train" else val
    pairs = [(str(file.absolute()), label) for label, files in enumerate(classes.values()) for file in files]
    names = tuple(os.fsencode(name).decode("utf-8", "backslashreplace") for name in classes)
    return ImageFolder(names, *(tuple(column) for column in zip(*pairs, strict=True)))


def _natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts digits as numbers and ignores case."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def _holds_folders(path: Path) -> bool:
    """Whether `path` is a folder of class folders, not itself the folder of a class named train or val."""
    try:
        return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())
    except OSError as error:
        raise DataError(f"{shown(path)}: {reason(error)}") from error


def _two_or_more_classes(root: Path) -> dict[str, list[Path]]:
    try:
        classes = class_folders(root)
    except ImageError as error:
        raise DataError(str(error)) from error
    if len(classes) == 1:
        raise DataError(f"{shown(root)}: one class only, {shown(Path(*classes))}; there must be two or more")
    return classes


def _split(folder: Path, files: list[Path], split: Split, fraction: float, seed: int) -> list[Path]:
    """The files of one class that belong to `split`, in their order."""
    if fraction == 0:
        return files if split == "train" else []
    if len(files) < 2:
        raise DataError(f"{shown(folder)}: one image is too few to split; add some, or make folders train/ and val/")

    def digest(file: Path) -> bytes:
        name = file.relative_to(folder).as_posix()
        return hashlib.blake2b(os.fsencode(f"{seed}/{folder.name}/{name}"), digest_size=16).digest()

    count = min(max(round(len(files) * fraction), 1), len(files) - 1)
    held_out = set(sorted(files, key=digest)[:count])
    return [file for file in files if (file in held_out) == (split == "val")]
