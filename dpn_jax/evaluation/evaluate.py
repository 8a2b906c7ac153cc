"""A model's answers to labeled images."""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from dpn_jax.errors import ImageError
from dpn_jax.evaluation.classes import labeled_images, relabeled
from dpn_jax.evaluation.metrics import Evaluation
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.sources import LabeledImages, Unlabeled, are_crops
from dpn_jax.images.splits import ImageFolder
from dpn_jax.inference.classifier import Classifier


def evaluate(
    classifier: Classifier,
    source: str | os.PathLike | LabeledImages,
    *,
    valid_labels: Collection[int] | None = None,
    answers: Sequence[Collection[int]] | None = None,
) -> Evaluation:
    """Runs a model on labeled images.

    Args:
      classifier: the model.
      source: the path of class folders, of a packed folder or of a CSV file, or an `ImageFolder` or `PackedImages`,
        whose classes are found by name, see `labeled_images`; or anything else with `len()` and `[index]`, whose items
        are an image, as `read_image` accepts it, and the index of its class among the model's: a list, a Hugging Face
        `datasets.Dataset`, ...
      valid_labels: indices of the classes to choose among, such as the 200 of ImageNet-A; defaults to all.
      answers: for each image the indices of the classes that are right, where there may be several or none
        (ImageNet-ReaL, see `read_real_labels`); decides top-1 and top-5. Defaults to the image's label.

    Returns:
      The logits, and what follows from them. Images that cannot be read are failures.

    Raises:
      ImageError: the path cannot be listed, or has packed crops of another geometry than the model's.
      ValueError: a class is none of the model's or not among `valid_labels`, or there are not as many `answers` as
        images.

    Example:
      Two photos::

        result = evaluate(Classifier.from_pretrained("dpn92.mx_in1k"), [("tabby.jpg", 281), ("pug.jpg", 254)])
        print(result.top1.value, result.top1.interval)
    """
    if isinstance(source, PackedImages):
        source = source.folder
    if isinstance(source, str | os.PathLike):
        source = labeled_images(source, classifier)
    elif isinstance(source, ImageFolder):
        source = relabeled(source, "the images", classifier)
    images, prepared = Unlabeled(source), are_crops(source, classifier.transform)
    with contextlib.closing(classifier.stream_logits(images, prepared=prepared, total=len(images))) as rows:
        result = collect(rows, source, images.labels, classifier, valid_labels=valid_labels, answers=answers)
    return dataclasses.replace(result, throughput=classifier.throughput)


def collect(
    rows: Iterable[np.ndarray | ImageError],
    source: LabeledImages,
    labels: Mapping[int, int],
    classifier: Classifier,
    *,
    valid_labels: Collection[int] | None = None,
    answers: Sequence[Collection[int]] | None = None,
) -> Evaluation:
    """What `evaluate` returns, from the logits of each image, or why it could not be read.

    Args:
      rows: float32 [K] for each image of `source`, in order.
      source: the images.
      labels: the class of each image that could be read, by its index; may fill as `rows` are read.
      classifier: gives the class names.
      valid_labels, answers: as for `evaluate`.
    """
    names, count = tuple(classifier.labels), len(source)
    if answers is not None and len(answers) != count:
        raise ValueError(f"answers must be as many as the images, {count}, got {len(answers)}")
    left_out = np.ones(len(names), bool)
    left_out[list(range(len(names)) if valid_labels is None else valid_labels)] = False
    files = getattr(source, "files", None)
    read: list[int] = []
    failures: list[ImageError] = []
    logits: list[np.ndarray] = []
    for row, index in zip(rows, range(count), strict=True):
        if isinstance(row, ImageError):
            failures.append(row)
            continue
        label = labels[index]
        if label >= len(names):
            raise ValueError(f"item {index}: its label is {label}, but the model has {len(names)} classes")
        if left_out[label]:
            raise ValueError(f"item {index}: its class, {names[label]!r}, is not among valid_labels")
        read.append(index)
        logits.append(np.where(left_out, np.float32(-np.inf), row))
    return Evaluation(
        class_names=names,
        files=tuple(f"item {index}" if files is None else files[index] for index in read),
        labels=np.array([labels[index] for index in read], np.int64),
        logits=np.stack(logits) if logits else np.zeros((0, len(names)), np.float32),
        indices=np.array(read, np.int64),
        failures=tuple(failures),
        answers=None if answers is None else tuple(frozenset(answers[index]) for index in read),
    )
