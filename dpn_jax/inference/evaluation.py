"""Top-1 and top-5 accuracy of a model on labeled images."""

import contextlib
import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dpn_jax.errors import ImageError, shown
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.sources import LabeledImages, Unlabeled, are_crops
from dpn_jax.images.splits import ImageFolder, list_images
from dpn_jax.inference.classifier import Classifier, Prediction


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


def evaluate(classifier: Classifier, source: str | os.PathLike | LabeledImages) -> Accuracy:
    """Classifies labeled images and counts correct predictions.

    Args:
      classifier: the model.
      source: the path of class folders, of a packed folder or of a CSV file, or an `ImageFolder` or `PackedImages`,
        whose classes are found by name, see `labeled_images`; or anything else with `len()` and `[index]`, whose items
        are an image, as `read_image` accepts it, and the index of its class among the model's: a list, a Hugging Face
        `datasets.Dataset`, ...

    Returns:
      The counts. Images that cannot be read are failures.

    Raises:
      ImageError: the path cannot be listed, or has packed crops of another geometry than the model's.
      ValueError: a class is none of the model's.

    Example:
      Two photos::

        accuracy = evaluate(Classifier.from_pretrained("dpn92.mx_in1k"), [("tabby.jpg", 281), ("pug.jpg", 254)])
        print(accuracy.top1 / accuracy.images)
    """
    if isinstance(source, PackedImages):
        source = source.folder
    if isinstance(source, str | os.PathLike):
        source = labeled_images(source, classifier)
    elif isinstance(source, ImageFolder):
        source = _relabeled(source, "the images", classifier)
    images = Unlabeled(source)

    def labels() -> Iterator[int]:
        for index in range(len(images)):
            label = images.labels.get(index, 0)  # of a failure it does not count
            if label >= len(classifier.labels):
                raise ValueError(
                    f"item {index}: its label is {label}, but the model has {len(classifier.labels)} classes"
                )
            yield label

    prepared = are_crops(source, classifier.transform)
    with contextlib.closing(classifier.stream(images, prepared=prepared, total=len(images))) as results:
        return score(results, labels())


def labeled_images(path: str | os.PathLike, classifier: Classifier) -> ImageFolder:
    """Lists the images of class folders, a packed folder or a CSV file, with the model's indices of their classes.

    All classes are named in the same way: by the classifier's labels, by WordNet synsets ('n01440764', if the classes
    are ImageNet-1k's), or by class indices from 0 (unless a label is itself a number).

    Args:
      path: as for `list_images`; some classes may be absent.
      classifier: gives the labels and synsets.

    Returns:
      The images; their labels are indices of the classifier's.

    Raises:
      ImageError: `list_images` fails; the message names the folder or file.
      ValueError: a class is not one of the model; the message names some of these and some of the classes.

    Example:
      >>> labeled_images("no-such-folder", classifier=None)
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder
    """
    return _relabeled(list_images(path), path, classifier)


def _relabeled(images: ImageFolder, name: str | os.PathLike, classifier: Classifier) -> ImageFolder:
    """The same images, with the model's classes."""
    if images.class_names == classifier.labels:
        return images
    indices = _class_indices(name, images.class_names, classifier)
    labels = tuple(indices[images.class_names[label]] for label in images.labels)
    return dataclasses.replace(images, class_names=classifier.labels, labels=labels)


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
