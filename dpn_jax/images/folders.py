"""Folders of images: the one walk over them, whether they are classified, evaluated or trained on."""

import logging
import os
import re
import unicodedata
from pathlib import Path

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.images.read import SUFFIXES, UNSUPPORTED_SUFFIXES
from dpn_jax.paths import entries, forget, holds, kind, readable_path

# besides hidden ones: of macOS's archives, Python, Synology, Windows, ext4
_LEFT_BEHIND = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
)
_RUN_FILES = ("metrics.jsonl", "config.json")  # of a fine-tuning run, which also holds a picture of its curves

logger = logging.getLogger("dpn_jax")


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Lists the images in a folder and its subfolders by their suffixes, in either case; no image is opened.

    What systems and tools leave behind is passed over at every level: hidden files and folders (named '.*'),
    `__MACOSX` and the like, and the folders of fine-tuning runs. A warning (logger `dpn_jax`) tells how many, and how
    many photos have a format that cannot be read.

    Args:
      folder: where to look, also in a bucket ('gs://bucket/photos'). Symbolic links are followed, as in timm, except
        into a folder that contains them.

    Returns:
      Paths that begin with `folder`, sorted; those in a bucket are `epath.Path`s.

    Raises:
      ImageError: `folder` or a folder in it cannot be listed.

    Example:
      >>> image_files("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: No such file or directory
    """
    walk = Walk(readable_path(folder, error=ImageError))
    files = walk.images(walk.root)
    walk.tell()
    return files


def class_folders(root: str | os.PathLike) -> dict[str, list[Path]]:
    r"""Lists the images of `root/<class>/**`, class by class; no image is opened.

    Args:
      root: the folder, also in a bucket, that holds one folder of images per class. Files beside the class folders are
        skipped, and so is what `image_files` passes over; folders inside a class folder belong to its class.

    Returns:
      The images of each class, sorted, as paths that begin with `root`. The classes are in the natural order of their
      names (2 before 10), which are the folders' in Unicode's composed form (NFC); bytes that are not UTF-8 are written
      as `\xff`.

    Raises:
      ImageError: `root` is not a folder, it or a folder in it cannot be listed, it has no class folders, a class has no
        images, two folders have one name in different Unicode forms, or all class folders hold folders only; the
        message names the folder.

    Example:
      >>> class_folders("no-such-folder")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder

    Source: `timm.data.readers.reader_image_folder` and, for the order, `timm.data.readers.class_map.natural_key`.
    """
    root = readable_path(root, error=ImageError)
    walk = Walk(root)
    folders: dict[str, Path] = {}
    for folder in walk.folders(root):
        twin = folders.setdefault(_class_name(folder), folder)
        if twin is not folder:
            raise ImageError(f"{shown(folder)}: a second folder of this name, in another Unicode form; join the two")
    if not folders:
        raise ImageError(f"{shown(root)}: no class folders; expected {shown(root / '<class>' / '<image>')}")
    classes = {name: walk.images(folders[name]) for name in sorted(folders, key=natural_key)}
    walk.tell()
    if any(classes.values()) and not any(file.parent == folders[name] for name in classes for file in classes[name]):
        names = ", ".join(shown(f"{folder.name}/") for folder in sorted(folders.values())[:3])
        raise ImageError(
            f"{shown(root)}: its folders ({names}{', ...' if len(folders) > 3 else ''}) hold no images, only folders: "
            "a level too many; name the folder whose folders are the classes"
        )
    for name, files in classes.items():
        if not files:
            raise ImageError(f"{shown(folders[name])}: the class has no images; add some, or remove the folder")
    return classes


class Walk:
    """Lists folders, and remembers what it passes over.

    Args:
      root: where it starts.
    """

    def __init__(self, root: Path) -> None:
        forget(root)
        self.root = root
        self._passed_over: list[Path] = []
        self._unreadable: list[Path] = []

    def folders(self, folder: Path) -> list[Path]:
        """The folders in `folder`, sorted.

        Raises:
          ImageError: it is not a folder, or cannot be listed.
        """
        try:
            if (found := kind(folder)) != "folder":
                raise ImageError(f"{shown(folder)}: {'is not a folder' if found else 'no such folder'}")
        except OSError as error:
            raise ImageError(f"{shown(folder)}: {reason(error)}") from error
        return sorted(self._entries(folder)[0])

    def images(self, folder: Path) -> list[Path]:
        """The images in `folder` and its subfolders, sorted.

        Raises:
          ImageError: it or one of them cannot be listed.
        """
        found = []
        pending = [(folder, frozenset[Path]())]
        while pending:
            directory, ancestors = pending.pop()
            if (real := _resolved(directory)) not in ancestors:
                folders, files = self._entries(directory)
                pending += ((inner, ancestors | {real}) for inner in folders)
                found += (file for file in files if file.suffix.lower() in SUFFIXES)
                self._unreadable += (file for file in files if file.suffix.lower() in UNSUPPORTED_SUFFIXES)
        return sorted(found)

    def tell(self) -> None:
        """Warns about what was passed over, in a line for each reason."""
        for paths, what in (
            (self._passed_over, "passed over, as systems and tools leave such names behind"),
            (self._unreadable, "in formats that cannot be read; convert them to JPEG or PNG"),
        ):
            if paths:
                names = ", ".join(shown(path.relative_to(self.root)) for path in sorted(paths)[:3])
                logger.warning(
                    "%s: %d %s (%s%s)", shown(self.root), len(paths), what, names, ", ..." if len(paths) > 3 else ""
                )

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the files in a folder, without what is passed over."""
        folders, files = [], []
        try:
            for name, is_folder in entries(folder):
                path = folder / name
                if not _is_left_behind(path, is_folder):
                    (folders if is_folder else files).append(path)
                elif is_folder or path.suffix.lower() in SUFFIXES:
                    self._passed_over.append(path)
        except OSError as error:
            raise ImageError(f"{shown(folder)}: {reason(error)}") from error
        return folders, files


def _is_left_behind(path: Path, is_folder: bool) -> bool:
    if path.name.startswith(".") or path.name.lower() in _LEFT_BEHIND:
        return True
    return is_folder and holds(path, _RUN_FILES)


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve() if isinstance(folder, Path) else folder  # a bucket has no links
    except OSError as error:
        raise ImageError(f"{shown(folder)}: {reason(error)}") from error


def _class_name(folder: Path) -> str:
    return unicodedata.normalize("NFC", os.fsencode(folder.name).decode("utf-8", "backslashreplace"))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """What class names are sorted by: digits count as numbers, and case does not.

    Example:
      >>> sorted(["b", "10", "2", "A"], key=natural_key)
      ['2', '10', 'A', 'b']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name
