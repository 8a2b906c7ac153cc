"""What the logits of labeled images say about a model: accuracies with their uncertainty, confusions, calibration."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from dpn_jax.errors import ImageError
from dpn_jax.inference.throughput import Throughput

_BINS = 15


class Proportion(NamedTuple):
    """A count out of a total, such as an accuracy.

    Args:
      count: how many are meant.
      total: out of how many.
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The proportion, in [0, 1]; NaN of nothing."""
        return self.count / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval; the whole of [0, 1] for nothing.

        Example:
          >>> [round(end, 4) for end in Proportion(19, 20).interval]
          [0.7639, 0.9911]

        Source: `scipy.stats.binomtest(...).proportion_ci(method="wilson")`.
        """
        if not self.total:
            return 0.0, 1.0
        from scipy.stats import binomtest

        low, high = binomtest(self.count, self.total).proportion_ci(method="wilson")
        return float(low), float(high)


class Calibration(NamedTuple):
    """Whether probabilities are what they say: of the images that get 0.8, are 80% right?"""

    error: float
    """Expected calibration error, in [0, 1]: the mean distance between confidence and accuracy, over 15 equal bins of
    the confidence, weighted by their images (Guo et al., 2017)."""
    counts: np.ndarray
    """int [15]: images in each bin, whose edges are i / 15; the upper one belongs to it."""
    confidences: np.ndarray
    """float64 [15]: their mean probability of the class that is answered; NaN for an empty bin."""
    accuracies: np.ndarray
    """float64 [15]: the fraction of them that is right; NaN for an empty bin."""


class ClassResult(NamedTuple):
    """How the images of one class, and the images that were taken for it, came out."""

    name: str
    images: int
    recall: Proportion
    """Of the images of the class, those that were recognized: the accuracy of the class."""
    precision: Proportion
    """Of the images that were taken for the class, those that are of it."""
    f1: float
    """Harmonic mean of the two, in [0, 1]; 0 where nothing was recognized."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model did on N labeled images of K classes; every figure follows from the logits.

    Args:
      class_names: K names.
      files: N names of the images, as far as they have any.
      indices: int [N], where each stands in the data; defaults to 0 to N - 1.
      labels: int [N], the true classes.
      logits: float32 [N, K]; -inf for classes that were left out of the choice.
      failures: one for each image that could not be read, which counts nowhere else.
      answers: for each image the classes that are right (ImageNet-ReaL), where there may be several or none; defaults
        to its label. Decides `top1` and `top5`, over the images that have any, and nothing else.
      throughput: images/s, if that was measured.

    Example:
      >>> result = Evaluation(("cat", "dog"), ("a", "b"), np.array([0, 0]), np.array([[2, 0], [0, 1]], np.float32))
      >>> result.top1
      Proportion(count=1, total=2)
      >>> result.confusion.tolist()
      [[1, 1], [0, 0]]
    """

    class_names: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray
    indices: np.ndarray | None = None
    failures: tuple[ImageError, ...] = ()
    answers: tuple[frozenset[int], ...] | None = None
    throughput: Throughput | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int [N]: how many classes come before the first right one; -1 for an image without a right one.

        Equal logits stand in the order of the classes, as in `torch.topk` on a CPU.
        """
        answers = [(label,) for label in self.labels.tolist()] if self.answers is None else self.answers
        ranks = np.full(len(self), -1)
        for row, (logits, right) in enumerate(zip(self.logits, answers, strict=True)):
            if right:
                ranks[row] = min(_rank(logits, k) for k in right)
        return ranks

    @functools.cached_property
    def predictions(self) -> np.ndarray:
        """int [N]: the most probable class of each image."""
        return self.logits.argmax(axis=1)

    @functools.cached_property
    def confidences(self) -> np.ndarray:
        """float64 [N]: the probability of the most probable class."""
        return self._confidences(1.0)

    def top(self, k: int) -> Proportion:
        """The images that have a right answer among their `k` most probable classes.

        Args:
          k: 1 to K.

        Raises:
          ValueError: `k` is not 1 to K.
        """
        if not 1 <= k <= len(self.class_names):
            raise ValueError(f"k must be 1 to the number of classes, {len(self.class_names)}, got {k!r}")
        judged = self.ranks[self.ranks >= 0]
        return Proportion(int((judged < k).sum()), len(judged))

    @property
    def top1(self) -> Proportion:
        """The images whose most probable class is right."""
        return self.top(1)

    @property
    def top5(self) -> Proportion:
        """The images that have a right class among the five most probable, or among all where there are fewer."""
        return self.top(min(5, len(self.class_names)))

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """int [K, K]: images by true class (rows) and most probable class (columns)."""
        counts = np.zeros((len(self.class_names),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.predictions), 1)
        return counts

    @property
    def per_class(self) -> tuple[ClassResult, ...]:
        """Each class that an image has or was taken for, in the order of the classes."""
        true, taken = self.confusion.sum(axis=1).tolist(), self.confusion.sum(axis=0).tolist()
        return tuple(
            ClassResult(
                name, true[k], Proportion(right, true[k]), Proportion(right, taken[k]), 2 * right / (true[k] + taken[k])
            )
            for k, (name, right) in enumerate(zip(self.class_names, np.diag(self.confusion).tolist(), strict=True))
            if true[k] + taken[k]
        )

    @property
    def balanced_accuracy(self) -> float:
        """The mean accuracy of the classes that have images, or macro accuracy, as `sklearn.metrics` has it."""
        return float(np.mean([result.recall.value for result in self.per_class if result.images]))

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that an image has or was taken for, as `sklearn.metrics.f1_score` has it."""
        return float(np.mean([result.f1 for result in self.per_class]))

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """float64 [N]: cross-entropy of each image, nats."""
        return _normalizers(self.logits) - self.logits[np.arange(len(self)), self.labels]

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return float(self.losses.mean())

    def calibration(self, temperature: float = 1.0) -> Calibration:
        """How far the probabilities can be trusted, with the logits divided by a temperature.

        Args:
          temperature: positive; 1 leaves the probabilities as they are.

        Raises:
          ValueError: the temperature is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        confidence = self._confidences(temperature)
        right = self.predictions == self.labels
        bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
        counts = np.bincount(bins, minlength=_BINS)
        with np.errstate(invalid="ignore"):
            confidences = np.bincount(bins, confidence, _BINS) / counts
            accuracies = np.bincount(bins, right, _BINS) / counts
        error = np.nansum(counts * np.abs(confidences - accuracies)) / len(self)
        return Calibration(float(error), counts, confidences, accuracies)

    @functools.cached_property
    def temperature(self) -> float:
        """What to divide the logits by to get the smallest loss; above 1 for a model that is too sure of itself.

        It is fitted to these images, so it must be judged on others. It changes no answer.

        Source: Guo et al., On Calibration of Modern Neural Networks, 2017.
        """
        from scipy.optimize import minimize_scalar

        chosen = self.logits[np.arange(len(self)), self.labels].astype(np.float64)

        def loss(log_temperature: float) -> float:
            temperature = np.exp(log_temperature)
            return float((_normalizers(self.logits, temperature) - chosen / temperature).mean())

        return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").x))

    def mistakes(self, most: int) -> list[int]:
        """Indices of the images that were answered wrongly with the largest probability, that one first.

        Args:
          most: as many, or fewer if there are no more.
        """
        wrong = np.flatnonzero(self.predictions != self.labels)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")][:most].tolist()

    def _confidences(self, temperature: float) -> np.ndarray:
        return np.exp(self.logits.max(axis=1) / temperature - _normalizers(self.logits, temperature))


def _rank(logits: np.ndarray, index: int) -> int:
    """How many classes come before one; those that are NaN do."""
    before = ~(logits <= logits[index])
    before[:index] |= logits[:index] == logits[index]
    return int(before.sum())


def _normalizers(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [N]: the logarithm of the sum of the exponentials of a row, a part at a time: ImageNet's are 400 MB."""
    from scipy.special import logsumexp

    parts = (logits[first : first + 1024] for first in range(0, len(logits), 1024))
    return np.concatenate([np.zeros(0), *(logsumexp(part.astype(np.float64) / temperature, axis=1) for part in parts)])


def most_confused(result: Evaluation, most: int) -> list[tuple[str, str, int]]:
    """Pairs of a true class and another that its images were taken for, and how often, the most frequent first."""
    wrong = result.confusion * (1 - np.eye(len(result.class_names), dtype=np.int64))
    chosen = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(chosen, wrong.shape), strict=True)
    return [(result.class_names[a], result.class_names[b], int(wrong[a, b])) for a, b in pairs if wrong[a, b]]
