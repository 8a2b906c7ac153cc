"""From photos to labels: a model, its preprocessing and its class names, compiled for a few batch sizes."""

import collections
import concurrent.futures
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.errors import ImageError
from dpn_jax.fast.forward import PlainForward, fast_forward
from dpn_jax.images.labels import imagenet_labels
from dpn_jax.images.read import ImageSource
from dpn_jax.images.transform import Transform
from dpn_jax.inference.throughput import Clock, Throughput
from dpn_jax.model import DPN
from dpn_jax.pretrained import default_preprocessing

_READ_AHEAD = 2
"""Batches of images prepared ahead of the device."""


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


class Classifier:
    """Classifies photos.

    Args:
      model: the model; runs in eval mode. Later changes to it have no effect.
      transform: prepares an image; defaults to that of the weights, or of the architecture's default weights.
      labels: a name for each class; defaults to the model's class names, or ImageNet-1k's.
      batch_size: largest batch. Smaller ones are padded to a power of two, so that only a few sizes are compiled.
      device: where to run; defaults to JAX's default device.
      workers: threads that read and prepare images; defaults to the number of CPU cores.
      fast: run the backend's fast form; False runs the model as it is, which any changed model needs.
      donate: give the model's arrays away, see `fast_forward`.

    Attributes:
      throughput: of the last stream that was read to its end; None if that was too short to measure.

    Raises:
      ValueError: the model has no classifier, its number of channels is not the transform's, the number of labels is
        not that of the classes, or the model is not stock (see `dpn_jax.stock`) and `fast` is set.

    Example:
      >>> import dpn_jax
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> classifier = Classifier(model, labels=("cat", "dog", "bird"))
      >>> best, second = classifier(np.zeros((300, 300, 3), np.uint8), top_k=2)
      >>> best.probability >= second.probability
      True
    """

    def __init__(
        self,
        model: DPN,
        *,
        transform: Transform | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 32,
        device: jax.Device | None = None,
        workers: int | None = None,
        fast: bool = True,
        donate: bool = False,
    ) -> None:
        config, provenance = model.config, model.provenance
        if not config.num_classes or not config.global_pool:
            raise ValueError("the model does not give one logit per class (num_classes is 0 or global_pool is '')")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.transform = transform or Transform(provenance.preprocessing or default_preprocessing(config))
        if len(self.transform.preprocessing.mean) != config.in_channels:
            raise ValueError(
                f"the model reads {config.in_channels} channels, but the preprocessing gives "
                f"{len(self.transform.preprocessing.mean)}"
            )
        synsets: Sequence[str | None] = (None,) * config.num_classes
        if labels is None and provenance.class_names is not None:
            labels = provenance.class_names
        if labels is None:
            if config.num_classes == 1000:
                synsets, labels = zip(*imagenet_labels(), strict=True)
            else:
                labels = [f"class {index}" for index in range(config.num_classes)]
        if len(labels) != config.num_classes:
            raise ValueError(f"the model has {config.num_classes} classes, but there are {len(labels)} labels")
        self.labels = tuple(labels)
        self.synsets = tuple(synsets)
        self.batch_size = batch_size
        self.workers = workers or os.cpu_count()
        self.throughput: Throughput | None = None
        self._device = device
        backend = None if device is None else device.platform
        self._forward = fast_forward(model, backend=backend, donate=donate) if fast else PlainForward(model)
        self._forward.params = jax.device_put(self._forward.params, device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        transform: Transform | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 32,
        device: jax.Device | None = None,
        workers: int | None = None,
        fast: bool = True,
        **options: object,
    ) -> "Classifier":
        """Loads pretrained weights into a classifier.

        Args:
          source: as for `dpn_jax.from_pretrained`.
          transform, labels, batch_size, device, workers, fast: as for `Classifier`.
          options: other keyword arguments of `dpn_jax.from_pretrained`, such as `dtype=jnp.bfloat16`.

        Raises:
          CheckpointError, ValueError: as `dpn_jax.from_pretrained` and `Classifier`.
        """
        model = from_pretrained(source, **options)
        return cls(
            model,
            transform=transform,
            labels=labels,
            batch_size=batch_size,
            device=device,
            workers=workers,
            fast=fast,
            donate=True,
        )

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], *, top_k: int | None = None
    ) -> list[Prediction] | list[list[Prediction]]:
        """Classifies one image, or several.

        Args:
          images: what `read_image` accepts, such as a path, the bytes of a file, a PIL image or a uint8 array
            `[H, W, 3]`; or a list or tuple of these.
          top_k: number of classes to return, 1 to the number of classes; defaults to 5, or to all if there are fewer.

        Returns:
          The most probable classes, best first; for several images, a list of these lists.

        Raises:
          ImageError: an image cannot be read.
          ValueError: `top_k` is below 1 or above the number of classes.
        """
        several = isinstance(images, list | tuple)
        results = []
        for result in self.stream(images if several else [images], top_k=top_k):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if several else results[0]

    def stream(
        self, images: Iterable[ImageSource], *, top_k: int | None = None
    ) -> Iterator[list[Prediction] | ImageError]:
        """Classifies any number of images as they come; one that cannot be read does not stop the others.

        Args:
          images: as for a call; only a few batches are read ahead.
          top_k: as for a call.

        Yields:
          For each image, in order, its most probable classes, or the error if it cannot be read.

        Raises:
          ValueError: `top_k` is below 1 or above the number of classes.
        """
        if top_k is None:
            top_k = min(5, len(self.labels))
        if not 1 <= top_k <= len(self.labels):
            raise ValueError(f"top_k must be 1 to {len(self.labels)}, got {top_k}")
        return self._stream(images, top_k)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Computes the logits of prepared images.

        Args:
          images: `[B, H, W, C]` from the transform.

        Returns:
          float32 `[B, num_classes]`.
        """
        parts = [self._dispatch(images[i : i + self.batch_size]) for i in range(0, len(images), self.batch_size)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])[: len(images)]

    def _stream(self, images: Iterable[ImageSource], top_k: int) -> Iterator[list[Prediction] | ImageError]:
        clock = Clock(min(self.workers, os.cpu_count()), read_ahead=_READ_AHEAD)
        running: collections.deque[tuple[list[np.ndarray | ImageError], concurrent.futures.Future | None]]
        running = collections.deque()
        size = 0
        with _threads(self.workers) as readers, _threads(1) as watcher:
            for prepared in _batched(self._prepared(images, readers, clock), self.batch_size):
                good = [image for image in prepared if not isinstance(image, ImageError)]
                logits = None
                if good:
                    before, size = size, max(size, self._padded(len(good)))  # a smaller last batch: no compilation
                    start = time.perf_counter()
                    batch = self._dispatch(good, size)
                    logits = watcher.submit(clock.wait, batch, start, len(good), compiles=size > before)
                running.append((prepared, logits))
                if len(running) > 1:  # the device computes this batch while the previous one is reported
                    yield from self._report(*running.popleft(), top_k)
            while running:
                yield from self._report(*running.popleft(), top_k)
        self.throughput = clock.throughput()

    def _prepared(
        self, images: Iterable[ImageSource], pool: concurrent.futures.Executor, clock: Clock
    ) -> Iterator[np.ndarray | ImageError]:
        """Transforms images in threads, in order and ahead: Pillow releases the GIL when it decodes and resizes."""

        def prepare(image: ImageSource) -> tuple[np.ndarray | ImageError, float]:
            start = time.perf_counter()
            try:
                prepared = self.transform(image)
            except ImageError as error:
                prepared = error
            return prepared, time.perf_counter() - start

        pending: collections.deque[concurrent.futures.Future] = collections.deque()

        def first() -> np.ndarray | ImageError:
            prepared, seconds = pending.popleft().result()
            clock.count_prepared(seconds)
            return prepared

        for image in images:
            pending.append(pool.submit(prepare, image))
            if len(pending) > _READ_AHEAD * self.batch_size:
                yield first()
        while pending:
            yield first()

    def _padded(self, count: int) -> int:
        return min(self.batch_size, 1 << (count - 1).bit_length())

    def _dispatch(self, images: Sequence[np.ndarray], size: int | None = None) -> jax.Array:
        """Pads and dispatches a batch, and returns its logits, padding included, before they are computed."""
        padded = np.zeros((size or self._padded(len(images)), *images[0].shape), np.float32)
        np.stack(images, out=padded[: len(images)])
        return self._forward(jax.device_put(padded, self._device))

    def _report(
        self, prepared: list[np.ndarray | ImageError], logits: concurrent.futures.Future | None, top_k: int
    ) -> Iterator[list[Prediction] | ImageError]:
        # softmax on the host: on the device it would queue behind the next batch
        rows = iter(()) if logits is None else iter(_softmax(logits.result()))
        for image in prepared:
            yield image if isinstance(image, ImageError) else self._best(next(rows), top_k)

    def _best(self, probabilities: np.ndarray, top_k: int) -> list[Prediction]:
        order = np.argsort(-probabilities, kind="stable")[:top_k]  # ties go to the lower index, as in torch.topk on CPU
        return [
            Prediction(self.labels[index], float(probabilities[index]), int(index), self.synsets[index])
            for index in order
        ]


@contextlib.contextmanager
def _threads(count: int) -> Iterator[concurrent.futures.Executor]:
    """A thread pool that does not wait for its threads when a stream is abandoned."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # infinite logits, from weights taken with allow_nonfinite
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)


def _batched(items: Iterable[np.ndarray | ImageError], size: int) -> Iterator[list[np.ndarray | ImageError]]:
    batch: list[np.ndarray | ImageError] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
