"""Names of classes: ImageNet-1k's, or those of a label file."""

import functools
import importlib.resources
import os
from pathlib import Path
from typing import NamedTuple

from dpn_jax.errors import reason, shown


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


def read_labels(path: str | os.PathLike, num_classes: int) -> tuple[str, ...]:
    """Reads the names of a model's classes from a text file.

    Args:
      path: a UTF-8 file with one name per line, in the order of the logits; empty lines at its end do not count.
      num_classes: number of names expected.

    Returns:
      The names, without surrounding white space.

    Raises:
      ValueError: the file is missing, not UTF-8 text, or has the wrong number of names; the message names it.

    Example:
      >>> read_labels("no-such-file.txt", 2)
      Traceback (most recent call last):
      ValueError: no-such-file.txt: no such label file
    """
    name = shown(path)
    if not Path(path).is_file():
        raise ValueError(f"{name}: no such label file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: label file cannot be read as UTF-8 text: {reason(error)}") from error
    labels = tuple(line.strip() for line in text.split("\n")) if text else ()
    if len(labels) != num_classes:
        raise ValueError(
            f"{name}: label file has {len(labels)} labels, one per line, but the model has {num_classes} classes"
        )
    return labels
