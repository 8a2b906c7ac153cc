"""Top-1 and top-5 accuracy of a model on a folder of class folders."""

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dpn_jax.errors import ImageError, shown
from dpn_jax.images.folders import class_folders
from dpn_jax.inference.classifier import Classifier, Prediction


class Example(NamedTuple):
    """An image and its class."""

    path: Path
    label: int
    """Index of the class, from 0."""


class Accuracy(NamedTuple):
    """How many images a model classified correctly."""

    images: int
    """Images that could be read."""
    top1: int
    """Images among these whose most probable class is the true one."""
    top5: int
    """Images among these whose true class is among the five most probable."""
    failures: tuple[ImageError, ...]
    """One for each image that could not be read, which counts nowhere else."""


def labeled_images(folder: str | os.PathLike, classifier: Classifier) -> tuple[Example, ...]:
    """Lists the images of `folder/<class>/*` with the index of their class.

    All class folders are named in the same way: by the classifier's labels, by WordNet synsets ('n01440764', if the
    classes are ImageNet-1k's), or by class indices from 0 (unless a label is itself a number).

    Args:
      folder: the folder that holds the class folders, as for `class_folders`; some classes may be absent.
      classifier: gives the labels and synsets.

    Returns:
      The images, sorted by folder and name.

    Raises:
      ImageError: `class_folders` fails; the message names the folder.
      ValueError: a class folder is not a class of the model; the message names some of these and some of the classes.

    Example:
      >>> labeled_images("no-such-folder", classifier=None)
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder
    """
    classes = class_folders(folder)
    indices = _class_indices(folder, sorted(classes), classifier)
    return tuple(Example(file, indices[name]) for name in sorted(classes) for file in classes[name])


def score(results: Iterable[Sequence[Prediction] | ImageError], labels: Iterable[int]) -> Accuracy:
    """Counts correct predictions.

    Args:
      results: what `Classifier.stream` yields, with its default `top_k`.
      labels: index of the true class of each image.

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


def _class_indices(folder: str | os.PathLike, names: Sequence[str], classifier: Classifier) -> Mapping[str, int]:
    """The class index of each folder name, by labels, synsets or indices: whichever knows the most names."""
    labels = [unicodedata.normalize("NFC", label) for label in classifier.labels]  # as class_folders names them
    # a label that two classes share, as ImageNet's crane the bird and crane the machine, names neither
    schemes = [{label: index for index, label in enumerate(labels) if labels.count(label) == 1}]
    if None not in classifier.synsets:
        schemes.append({synset: index for index, synset in enumerate(classifier.synsets)})
    if not any(label.isdecimal() for label in labels):
        schemes.append({name: int(name) for name in names if name.isdecimal() and int(name) < len(labels)})
    known = max(schemes, key=lambda scheme: sum(name in scheme for name in names))
    if unknown := [name for name in names if name not in known]:
        some = ", ".join(map(repr, list(known or schemes[0])[:5]))
        hint = "; to evaluate train or val, name that folder" if {"train", "val"} & set(unknown) else ""
        raise ValueError(
            f"{shown(folder)}: {len(unknown)} of {len(names)} class folders are not classes of the model: "
            f"{', '.join(map(repr, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}; "
            f"its classes are {some}{', ...' if len(labels) > 5 else ''}{hint}"
        )
    return known
