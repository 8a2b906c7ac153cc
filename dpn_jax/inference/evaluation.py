"""How often a model is right on a folder of class folders: top-1 and top-5."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dpn_jax.errors import ImageError, reason
from dpn_jax.images.folders import image_files
from dpn_jax.inference.classifier import Classifier, Prediction


class Example(NamedTuple):
    """An image and what is on it."""

    path: Path
    label: int
    """The class's number, from 0."""


class Accuracy(NamedTuple):
    """How often a model was right."""

    images: int
    """Those that could be read."""
    top1: int
    """Of these, those whose most probable class is the right one."""
    top5: int
    """Of these, those whose right class is among the five most probable."""
    failures: tuple[ImageError, ...]
    """One for each image that could not be read; they count nowhere else."""


def labeled_images(folder: str | os.PathLike, classifier: Classifier) -> tuple[Example, ...]:
    """Lists `folder/<class>/*`, images with the class that their folder is named after.

    The folders are named by the classifier's labels, or by ImageNet's synsets ('n01440764') for its 1000 classes, or by
    class numbers from 0; all of them in one of these ways. Numbers are not taken where a label is a number itself.
    Folders within a class folder belong to it; hidden ones, and files beside the class folders, are left out.

    Args:
      folder: the folder that holds the class folders; some classes may be absent.
      classifier: whose classes are meant.

    Returns:
      The images, sorted by folder and name.

    Raises:
      ImageError: a folder cannot be listed, has no class folders, or a class folder has no images; it is named.
      ValueError: class folders that are no class of the model's; the message names them and some that are.

    Example:
      >>> labeled_images("no-such-folder", classifier=None)
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: No such file or directory
    """
    root = Path(folder)
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ImageError(f"{root}: {reason(error)}") from error
    if not folders:
        raise ImageError(f"{root}: no class folders; the images of each class are expected in a folder of its own")
    numbers = _class_numbers(folders, classifier)
    examples = []
    for path in folders:
        files = image_files(path)
        if not files:
            raise ImageError(f"{path}: no images in this class folder")
        examples.extend(Example(file, numbers[path.name]) for file in files)
    return tuple(examples)


def score(results: Iterable[Sequence[Prediction] | ImageError], labels: Iterable[int]) -> Accuracy:
    """Compares predictions with the truth.

    Args:
      results: what `Classifier.stream(..., top_k=5)` yields.
      labels: the number of each image's class.

    Example:
      >>> cat, dog = Prediction("cat", 0.7, 0), Prediction("dog", 0.3, 1)
      >>> score([[cat, dog], [dog, cat]], [0, 0])
      Accuracy(images=2, top1=1, top5=2, failures=())
    """
    images = top1 = top5 = 0
    failures = []
    for result, label in zip(results, labels, strict=True):
        if isinstance(result, ImageError):
            failures.append(result)
            continue
        best = [prediction.index for prediction in result[:5]]
        images += 1
        top1 += best[0] == label
        top5 += label in best
    return Accuracy(images, top1, top5, tuple(failures))


def _class_numbers(folders: Sequence[Path], classifier: Classifier) -> Mapping[str, int]:
    """Each folder's class, by the first way of naming that knows them all."""
    labels = classifier.labels
    ways = [{label: index for index, label in enumerate(labels) if labels.count(label) == 1}]  # there are two cranes
    if None not in classifier.synsets:
        ways.append({synset: index for index, synset in enumerate(classifier.synsets)})
    names = [path.name for path in folders]
    if not any(label.isdecimal() for label in labels):
        ways.append({name: int(name) for name in names if name.isdecimal() and int(name) < len(labels)})
    known = max(ways, key=lambda way: sum(name in way for name in names))
    if unknown := [name for name in names if name not in known]:
        some = ", ".join(map(repr, list(known or ways[0])[:5]))
        split = "; is it one of its folders that you mean?" if {"train", "val"} & set(unknown) else ""
        raise ValueError(
            f"{folders[0].parent}: {len(unknown)} of {len(names)} class folders are no class of the model: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}; "
            f"its classes are {some}{', ...' if len(labels) > 5 else ''}{split}"
        )
    return known
