"""Which of a model's classes the images of a data set are, and which answers count as right."""

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dpn_jax.errors import DataError, ImageError, reason, shown
from dpn_jax.images.packed import is_packed
from dpn_jax.images.splits import ImageFolder, from_table, list_images
from dpn_jax.images.table import Problem, is_table, read_table
from dpn_jax.paths import read_bytes, readable_path


class ClassNames(Protocol):
    """What is needed of a `Classifier` here."""

    labels: tuple[str, ...]
    synsets: tuple[str | None, ...]


def labeled_images(path: str | os.PathLike, classifier: ClassNames) -> ImageFolder:
    """Lists the images of class folders, a packed folder or a CSV file, with the model's indices of their classes.

    All classes are named in the same way: by the classifier's labels, by WordNet synsets ('n01440764', if the classes
    are ImageNet-1k's), or by class indices from 0 (unless a label is itself a number).

    Args:
      path: as for `list_images`; some classes may be absent.
      classifier: gives the labels and synsets.

    Returns:
      The images; their labels are indices of the classifier's.

    Raises:
      ImageError: `list_images` fails; the message names the folder or file. Of a CSV file it tells the first 20 of all
        problems: lines that are not complete, images that are missing or named twice, and labels that are no class.
      ValueError: a class is not one of the model; the message names some of these and some of the classes.

    Example:
      >>> labeled_images("no-such-folder", classifier=None)
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder
    """
    root = readable_path(path, error=ImageError)
    if is_packed(root) or not is_table(root):
        return relabeled(list_images(path), path, classifier)
    table = read_table(root)
    known = _known(list(dict.fromkeys(row.label for row in table.rows)), classifier)
    unknown = [
        Problem(row.line, f"{row.label!r} is no class of the model") for row in table.rows if row.label not in known
    ]
    table.check([*table.missing(), *unknown], hint=f"; its classes are {_some(known, classifier)}" if unknown else "")
    return relabeled(from_table(table), path, classifier)


def relabeled(images: ImageFolder, name: str | os.PathLike, classifier: ClassNames) -> ImageFolder:
    """The same images, with the model's classes."""
    if images.class_names == classifier.labels:
        return images
    indices = class_indices(name, images.class_names, classifier)
    labels = tuple(indices[images.class_names[label]] for label in images.labels)
    return dataclasses.replace(images, class_names=classifier.labels, labels=labels)


def class_indices(
    where: str | os.PathLike, names: Sequence[str], classifier: ClassNames, *, noun: str = "class folders"
) -> Mapping[str, int]:
    """The class index of each name, by labels, synsets or indices: whichever knows the most names.

    Raises:
      ValueError: a name is none of the model's classes; the message names `where`, and what it has as `noun`.
    """
    known = _known(names, classifier)
    if unknown := [name for name in names if name not in known]:
        hint = "; to evaluate train or val, name that folder" if {"train", "val"} & set(unknown) else ""
        raise ValueError(
            f"{shown(where)}: {len(unknown)} of {len(names)} {noun} are not classes of the model: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}; "
            f"its classes are {_some(known, classifier)}{hint}"
        )
    return known


def _known(names: Sequence[str], classifier: ClassNames) -> dict[str, int]:
    """The way of naming classes that knows the most of some names."""
    labels = [unicodedata.normalize("NFC", label) for label in classifier.labels]  # as class_folders names them
    # a label that two classes share, as ImageNet's crane the bird and crane the machine, names neither
    schemes = [{label: index for index, label in enumerate(labels) if labels.count(label) == 1}]
    if None not in classifier.synsets:
        schemes.append({synset: index for index, synset in enumerate(classifier.synsets)})
    if not any(label.isdecimal() for label in labels):
        schemes.append({name: int(name) for name in names if name.isdecimal() and int(name) < len(labels)})
    known = max(schemes, key=lambda scheme: sum(name in scheme for name in names))
    return known or schemes[0]


def _some(known: Mapping[str, int], classifier: ClassNames) -> str:
    return f"{', '.join(map(repr, list(known)[:5]))}{', ...' if len(classifier.labels) > 5 else ''}"


def read_valid_labels(path: str | os.PathLike, classifier: ClassNames) -> tuple[int, ...]:
    """Indices of the classes that a text file lists, one a line, such as the 200 of ImageNet-A or ImageNet-R.

    Args:
      path: the file: labels, WordNet synsets or class indices, as `labeled_images` takes them.
      classifier: gives the labels and synsets.

    Raises:
      DataError: the file cannot be read, or lists nothing.
      ValueError: a class is not one of the model, or is listed twice.

    Source: timm's `validate.py --valid-labels`.
    """
    try:
        lines = read_bytes(readable_path(path, error=DataError)).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)}: cannot be read as text ({reason(error)})") from error
    names = [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{shown(path)}: lists no class")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(path)}: lists {twice!r} twice")
    indices = class_indices(path, names, classifier, noun="lines")
    return tuple(sorted(indices[name] for name in names))


def read_real_labels(path: str | os.PathLike, files: Sequence[str], classes: int) -> tuple[frozenset[int], ...]:
    """The right answers of ImageNet's validation images as they were judged again: several, or none.

    Args:
      path: `real.json` of ImageNet-ReaL: for image 1 to 50,000 a list of class indices.
      files: the images, named as ImageNet names them (`ILSVRC2012_val_00000001.JPEG`), in any folders.
      classes: number of the model's classes.

    Raises:
      DataError: the file is no such list, or a name is none of ImageNet's.

    Source: Beyer et al., Are we done with ImageNet?, 2020; `timm.data.real_labels.RealLabelsImagenet`.
    """
    try:
        real = json.loads(read_bytes(readable_path(path, error=DataError)))
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(path)}: cannot be read as JSON ({reason(error)})") from error
    if not isinstance(real, list) or not all(
        isinstance(right, list) and all(isinstance(k, int) and 0 <= k < classes for k in right) for right in real
    ):
        raise DataError(
            f"{shown(path)}: must be a list with a list of class indices, 0 to {classes - 1}, for each image"
        )
    answers = []
    for file in files:
        match = re.search(r"ILSVRC2012_val_(\d{8})(\.|$)", Path(file).name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(real):
            raise DataError(f"{shown(file)}: must be named ILSVRC2012_val_NUMBER, NUMBER from 1 to {len(real)}")
        answers.append(frozenset(real[number - 1]))
    return tuple(answers)
