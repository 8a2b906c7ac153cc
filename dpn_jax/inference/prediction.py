"""From the logits of an image to named classes and their probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Prediction(NamedTuple):
    """A class and its probability."""

    label: str
    """Name of the class; for ImageNet-1k its WordNet lemmas."""
    probability: float
    """In [0, 1], from a softmax over all classes."""
    index: int
    """Index of the class, from 0."""
    synset: str | None = None
    """WordNet id of the class ('n02123045'), for ImageNet-1k."""


def most_probable(
    logits: np.ndarray, top_k: int, labels: Sequence[str], synsets: Sequence[str | None]
) -> list[Prediction]:
    """The `top_k` most probable classes, best first.

    Args:
      logits: float32 [K].
      top_k: 1 to K.
      labels, synsets: of each class.

    Example:
      >>> most_probable(np.array([0.0, 0.0], np.float32), 1, ("cat", "dog"), (None, None))
      [Prediction(label='cat', probability=0.5, index=0, synset=None)]
    """
    # softmax on the host: on the device it would queue behind the next batch
    with np.errstate(invalid="ignore"):  # infinite logits, from weights taken with allow_nonfinite
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top_k]  # ties go to the lower index, as in torch.topk on CPU
    return [Prediction(labels[index], float(probabilities[index]), index, synsets[index]) for index in order.tolist()]
