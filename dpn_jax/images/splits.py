"""Images and their classes: of class folders, a CSV file or a packed folder; which are trained on, which held out."""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from dpn_jax.errors import DataError, ImageError, shown
from dpn_jax.images.folders import Walk, class_folders, natural_key
from dpn_jax.images.packed import PackedImages, identity, is_packed
from dpn_jax.images.read import ImageSource
from dpn_jax.images.table import Table, is_table, read_table
from dpn_jax.paths import absolute, readable_path
from dpn_jax.pretrained import Preprocessing

Split = Literal["train", "val", "all"]

_SPLIT_NAMES = {  # timm.data.dataset_factory
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images and their classes; `folder[index]` is an image, as `read_image` accepts it, and its class.

    Args:
      class_names: names of the classes, in the order of the logits.
      files: path of each image.
      labels: class of each image, its index in `class_names`.
      skipped: indices of images that are not read. In training the next image takes the place of such a one, so that
        nothing else moves.
      packed: where the files are; defaults to the file system.
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: frozenset[int] = frozenset()
    packed: PackedImages | None = dataclasses.field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[ImageSource, int]:
        file = self.files[index]
        return file if self.packed is None else self.packed.image(file), self.labels[index]

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The geometry of the images where they are packed crops; None for photos."""
        return self.packed and self.packed.preprocessing

    @property
    def identity(self) -> bytes:
        """Names and classes of the images, in their order; where they are makes no difference."""
        return identity(self.files, self.labels)

    def without(self, files: Collection[str]) -> "ImageFolder":
        """The same without some of the files, such as those that `find_broken` found.

        Args:
          files: paths, as in `files`; others are ignored.

        Raises:
          DataError: a class would have no images left.

        Example:
          >>> ImageFolder(("cat", "dog"), ("a.png", "b.png", "c.png"), (0, 1, 1)).without(["b.png"]).files
          ('a.png', 'c.png')
        """
        files = frozenset(files)
        kept = self.select([index for index, file in enumerate(self.files) if file not in files])
        for label in sorted(set(self.labels) - set(kept.labels)):
            raise DataError(f"class {self.class_names[label]!r}: none of its images can be read; add some that can")
        return kept

    def select(self, indices: Collection[int]) -> "ImageFolder":
        """The images at some indices, in their order here; none of them is skipped.

        Args:
          indices: in any order.

        Example:
          >>> ImageFolder(("cat", "dog"), ("a.png", "b.png", "c.png"), (0, 1, 1)).select({2, 0}).labels
          (0, 1)
        """
        chosen = sorted(indices)
        return dataclasses.replace(
            self,
            files=tuple(self.files[index] for index in chosen),
            labels=tuple(self.labels[index] for index in chosen),
            skipped=frozenset(),
        )


def image_folder(
    path: str | os.PathLike, *, split: Split, val_fraction: float | None = None, seed: int = 0
) -> ImageFolder:
    """Lists the training or the validation images of a folder of class folders; no image is opened.

    With `path/train/<class>/*` and `path/val/<class>/*` these are the two splits; `training`, `valid`, `validation`,
    `eval` and `evaluation` are names for them too, in either case. Otherwise `path/<class>/*` is split class by class,
    by a hash of the seed and each file's name, so that adding an image hardly moves any other.

    Args:
      path: the folder, also in a bucket ('gs://bucket/photos'); `class_folders` says which folders and files count.
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
    root = readable_path(path, error=DataError)
    if folders := _split_folders(root):
        names = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise DataError(f"{shown(root)}: has {names}; name one of the two")
    return _two_or_more_classes(root)


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
    root = readable_path(path, error=DataError)
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
        found = {name: _two_or_more_classes(folder) for name, folder in folders.items()}
        names = {split: set(images.class_names) for split, images in found.items()}
        if difference := sorted(names["train"] ^ names["val"]):
            name = difference[0]
            raise DataError(
                f"{shown(root)}: {folders['train'].name}/ and {folders['val'].name}/ must have the same class folders, "
                f"but {len(difference)} are in one only, such as "
                f"{shown(folders['train' if name in names['train'] else 'val'] / name)}"
            )
        return [found[split] for split in splits]
    fraction = 0.2 if val_fraction is None else val_fraction
    if "val" in splits and fraction == 0:
        raise DataError(f"{shown(root)}: val_fraction 0 leaves no images to validate with")
    everything = _two_or_more_classes(root)
    if fraction == 0:
        return [everything for _ in splits]
    held_out = _held_out(everything, root, fraction, seed)
    return [
        everything.select(held_out if split == "val" else held_out.symmetric_difference(range(len(everything))))
        for split in splits
    ]


def list_images(path: str | os.PathLike) -> ImageFolder:
    """Lists the images of class folders, of a packed folder or of a CSV file; no image is opened.

    Args:
      path: a folder as for `class_folders`; one that `dpn-jax pack` has written; or a file `*.csv`, whose columns
        `image` and `label` have each image's URL or path, from the file's folder, and the name of its class. Each may
        be in a bucket ('gs://bucket/photos').

    Returns:
      The images, as paths that begin with `path` (absolute ones, if they are packed), with at least one class; the
      classes in the natural order of their names (2 before 10).

    Raises:
      ImageError: `class_folders` fails, the packed folder's manifest or the CSV file cannot be read, or lines of that
        are not complete or name an image twice; the message names the folder, or the file and the lines.

    Example:
      >>> list_images("no-such.csv")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such.csv: cannot be read (No such file or directory)
    """
    root = readable_path(path, error=ImageError)
    if is_packed(root):
        packed = PackedImages(root)
        return ImageFolder(packed.class_names, packed.files, packed.labels, packed=packed)
    if is_table(root):
        return from_table(read_table(root))
    classes = class_folders(root)
    return _labeled([(file, name) for name, files in classes.items() for file in files])


def from_table(table: Table) -> ImageFolder:
    """The images of a CSV file.

    Raises:
      ImageError: as `Table.check`.
    """
    table.check()
    return _labeled([(image, label) for _, image, label in table.rows])


def _labeled(pairs: Sequence[tuple[Path | str, str]]) -> ImageFolder:
    """From each image and the name of its class."""
    names = tuple(sorted({name for _, name in pairs}, key=natural_key))
    index = {name: label for label, name in enumerate(names)}
    return ImageFolder(names, tuple(str(file) for file, _ in pairs), tuple(index[name] for _, name in pairs))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits, 'train' first; a folder of images is a class, whatever its name."""
    walk = Walk(root)
    found: dict[str, Path] = {}
    try:
        for folder in walk.folders(root):
            split = next((split for split, names in _SPLIT_NAMES.items() if folder.name.lower() in names), None)
            if split and (walk.folders(folder) or is_packed(folder)):
                twin = found.setdefault(split, folder)
                if twin is not folder:
                    raise DataError(f"{shown(root)}: {twin.name}/ and {folder.name}/ are both {split}; remove one")
    except ImageError as error:
        raise DataError(str(error)) from error
    return dict(sorted(found.items()))


def _two_or_more_classes(root: Path) -> ImageFolder:
    try:
        images = list_images(root)
    except ImageError as error:
        raise DataError(str(error)) from error
    if len(images.class_names) == 1:
        raise DataError(f"{shown(root)}: one class only, {shown(Path(*images.class_names))}; there must be two or more")
    return dataclasses.replace(images, files=tuple(str(absolute(readable_path(file))) for file in images.files))


def _held_out(images: ImageFolder, root: Path, fraction: float, seed: int) -> set[int]:
    """The indices of the images that are 'val': in each class, those whose names have the smallest hashes."""
    of_class: dict[int, list[int]] = {label: [] for label in range(len(images.class_names))}
    for index, label in enumerate(images.labels):
        of_class[label].append(index)

    def digest(index: int) -> bytes:
        name = unicodedata.normalize("NFC", readable_path(images.files[index]).relative_to(absolute(root)).as_posix())
        folder, _, rest = name.partition("/")
        class_name = images.class_names[images.labels[index]]
        return hashlib.blake2b(os.fsencode(f"{seed}/{class_name}/{rest or folder}"), digest_size=16).digest()

    held_out: set[int] = set()
    for label, indices in of_class.items():
        if len(indices) < 2:
            folder = shown(root / images.class_names[label])
            few = "one image is" if indices else "no images are"
            raise DataError(f"{folder}: {few} too few to split; add some, or make folders train/ and val/")
        count = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
        held_out.update(sorted(indices, key=digest)[:count])
    return held_out
