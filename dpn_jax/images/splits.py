"""Which images are trained on and which are held out: the splits of a folder of class folders."""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from dpn_jax.errors import DataError, ImageError, local_path, shown
from dpn_jax.images.folders import Walk, class_folders

Split = Literal["train", "val", "all"]

_SPLIT_NAMES = {  # timm.data.dataset_factory
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images and their classes.

    Args:
      class_names: names of the classes, in the order of the logits.
      files: path of each image.
      labels: class of each image, its index in `class_names`.
      skipped: indices of images that are not read. In training the next image takes the place of such a one, so that
        nothing else moves.
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: frozenset[int] = frozenset()

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


def image_folder(
    path: str | os.PathLike, *, split: Split, val_fraction: float | None = None, seed: int = 0
) -> ImageFolder:
    """Lists the training or the validation images of a folder of class folders; no image is opened.

    With `path/train/<class>/*` and `path/val/<class>/*` these are the two splits; `training`, `valid`, `validation`,
    `eval` and `evaluation` are names for them too, in either case. Otherwise `path/<class>/*` is split class by class,
    by a hash of the seed and each file's name, so that adding an image hardly moves any other.

    Args:
      path: the folder; `class_folders` says which folders and files count.
      split: 'train', 'val', or 'all' for every image of `path/<class>/*`.
      val_fraction: fraction of each class that is 'val', in [0, 1), at least one image and not all; 0 holds out none.
        Defaults to 0.2 where `path` has no split folders, which it does not go with.
      seed: seed of the split.

    Returns:
      The images, class by class in the natural order of the class names (2 before 10).

    Raises:
      DataError: `class_folders` fails, there is only one class, a class has too few images to split, the two splits do
        not have the same classes, or have their folders and `val_fraction` is given; the message names the folder.
      ValueError: `split` or `val_fraction` is out of range.

    Example:
      >>> image_folder("no-such-folder", split="train")
      Traceback (most recent call last):
      dpn_jax.errors.DataError: no-such-folder: no such folder

    Source: `timm.data.dataset_factory` for the names of the splits.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split must be 'train', 'val' or 'all', got {split!r}")
    if split != "all":
        return image_folders(path, (split,), val_fraction=val_fraction, seed=seed)[0]
    root = local_path(path, error=DataError)
    if folders := _split_folders(root):
        names = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise DataError(f"{shown(root)}: has {names}; name one of the two")
    return _labeled(_two_or_more_classes(root))


def image_folders(
    path: str | os.PathLike,
    splits: Sequence[Literal["train", "val"]] = ("train", "val"),
    *,
    val_fraction: float | None = None,
    seed: int = 0,
) -> list[ImageFolder]:
    """`image_folder` for several splits from one walk; arguments and errors are the same."""
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction!r}")
    root = local_path(path, error=DataError)
    folders = _split_folders(root)
    if len(folders) == 1:
        ((given, folder),) = folders.items()
        missing = "val" if given == "train" else "train"
        raise DataError(f"{shown(root)}: has {folder.name}/ but no {missing}/; add it, or name {shown(folder)}")
    if folders:
        if val_fraction is not None:
            names = " and ".join(f"{folders[name].name}/" for name in ("train", "val"))
            raise DataError(
                f"{shown(root)}: has {names}, so --val-fraction (val_fraction={val_fraction}) does not apply"
            )
        classes = {name: _two_or_more_classes(folder) for name, folder in folders.items()}
        if difference := sorted(classes["train"].keys() ^ classes["val"].keys()):
            name = difference[0]
            raise DataError(
                f"{shown(root)}: {folders['train'].name}/ and {folders['val'].name}/ must have the same class folders, "
                f"but {len(difference)} are in one only, such as "
                f"{shown(folders['train' if name in classes['train'] else 'val'] / name)}"
            )
        return [_labeled(classes[split]) for split in splits]
    fraction = 0.2 if val_fraction is None else val_fraction
    if "val" in splits and fraction == 0:
        raise DataError(f"{shown(root)}: val_fraction 0 leaves no images to validate with")
    everything = _two_or_more_classes(root)
    return [
        _labeled({name: _split(name, files, root, split, fraction, seed) for name, files in everything.items()})
        for split in splits
    ]


def _labeled(classes: dict[str, list[Path]]) -> ImageFolder:
    pairs = [(str(file.absolute()), label) for label, files in enumerate(classes.values()) for file in files]
    return ImageFolder(tuple(classes), *(tuple(column) for column in zip(*pairs, strict=True)))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits, 'train' first; a folder of images is a class, whatever its name."""
    walk = Walk(root)
    found: dict[str, Path] = {}
    try:
        for folder in walk.folders(root):
            split = next((split for split, names in _SPLIT_NAMES.items() if folder.name.lower() in names), None)
            if split and walk.folders(folder):
                twin = found.setdefault(split, folder)
                if twin is not folder:
                    raise DataError(f"{shown(root)}: {twin.name}/ and {folder.name}/ are both {split}; remove one")
    except ImageError as error:
        raise DataError(str(error)) from error
    return dict(sorted(found.items()))


def _two_or_more_classes(root: Path) -> dict[str, list[Path]]:
    try:
        classes = class_folders(root)
    except ImageError as error:
        raise DataError(str(error)) from error
    if len(classes) == 1:
        raise DataError(f"{shown(root)}: one class only, {shown(Path(*classes))}; there must be two or more")
    return classes


def _split(
    class_name: str, files: list[Path], root: Path, split: Literal["train", "val"], fraction: float, seed: int
) -> list[Path]:
    """The files of one class that belong to `split`, in their order."""
    if fraction == 0:
        return files if split == "train" else []
    if len(files) < 2:
        folder = shown(root / class_name)
        raise DataError(f"{folder}: one image is too few to split; add some, or make folders train/ and val/")

    def digest(file: Path) -> bytes:
        name = unicodedata.normalize("NFC", file.relative_to(root).as_posix().partition("/")[2])
        return hashlib.blake2b(os.fsencode(f"{seed}/{class_name}/{name}"), digest_size=16).digest()

    count = min(max(round(len(files) * fraction), 1), len(files) - 1)
    held_out = set(sorted(files, key=digest)[:count])
    return [file for file in files if (file in held_out) == (split == "val")]
