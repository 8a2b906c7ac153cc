"""Names of classes: ImageNet-1k's, or those of a label file."""

import functools
import importlib.resources
import io
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from dpn_jax.errors import reason, shown
from dpn_jax.paths import kind, read_bytes, readable_path


class Label(NamedTuple):
    """A class of ImageNet-1k: its WordNet synset, such as 'n01440764', and name, such as 'tench, Tinca tinca'."""

    synset: str
    name: str


@functools.cache
def imagenet_labels() -> tuple[Label, ...]:
    """The 1000 classes of ImageNet-1k, in the order of the published weights' logits.

    Example:
      >>> imagenet_labels()[0]
      Label(synset='n01440764', name='tench, Tinca tinca')

    Source: `timm.data.ImageNetInfo`.
    """
    text = importlib.resources.files("dpn_jax.images").joinpath("imagenet1k.txt").read_text(encoding="utf-8")
    return tuple(Label(*line.split("\t")) for line in text.splitlines())


def named_classes(labels: Sequence[str] | None, num_classes: int) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """The name and, for ImageNet-1k, the WordNet synset of each class.

    Args:
      labels: the names; defaults to ImageNet-1k's for 1000 classes, or else to 'class 0' and so on.
      num_classes: their number.

    Raises:
      ValueError: there is another number of labels.

    Example:
      >>> named_classes(None, 2)
      (('class 0', 'class 1'), (None, None))
    """
    if labels is None and num_classes == 1000:
        synsets, names = zip(*imagenet_labels(), strict=True)
        return names, synsets
    if labels is None:
        labels = [f"class {index}" for index in range(num_classes)]
    if len(labels) != num_classes:
        raise ValueError(f"the model has {num_classes} classes, but there are {len(labels)} labels")
    return tuple(labels), (None,) * num_classes


def read_labels(path: str | os.PathLike, num_classes: int) -> tuple[str, ...]:
    """Reads the names of a model's classes from a file.

    Args:
      path: a file, also in a bucket: UTF-8 text with one name per line, in the order of the logits; empty lines at
        its end do not count. Or JSON: a list of names, or an object by index, `{"0": "tench"}` as in the hub's
        `id2label` or `{"0": ["n01440764", "tench"]}` as in Keras's `imagenet_class_index.json`.
      num_classes: number of names expected.

    Returns:
      The names, without surrounding white space.

    Raises:
      ValueError: the file is missing, not UTF-8 text, JSON of another kind, or has an empty name or the wrong number of
        names; the message names it.

    Example:
      >>> read_labels("no-such-file.txt", 2)
      Traceback (most recent call last):
      ValueError: no-such-file.txt: no such label file
    """
    name, path = shown(path), readable_path(path)
    if kind(path) != "file":
        raise ValueError(f"{name}: no such label file")
    try:
        text = io.TextIOWrapper(io.BytesIO(read_bytes(path)), "utf-8-sig").read().rstrip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: label file cannot be read as UTF-8 text: {reason(error)}") from error
    labels = [line.strip() for line in text.split("\n")] if text else []
    try:
        labels = _from_json(json.loads(text)) if text.startswith(("[", "{")) else labels
    except (LookupError, TypeError) as error:
        raise ValueError(f"{name}: label file is JSON, but no list of names nor an object of names by index") from error
    except (ValueError, RecursionError):  # a text whose first name begins like this
        pass
    if len(labels) != num_classes:
        raise ValueError(f"{name}: label file has {len(labels)} labels, but the model has {num_classes} classes")
    if not all(labels):
        raise ValueError(f"{name}: label file has no name for class {labels.index('')}; each line is one class")
    return tuple(labels)


def _from_json(content: list[object] | dict[str, object]) -> list[str]:
    if isinstance(content, dict):
        content = [content[str(index)] for index in range(len(content))]
    names = [entry[-1] if isinstance(entry, list) else entry for entry in content]
    return [str.strip(name) for name in names]  # TypeError for what is no text
