"""From images to logits: read ahead on the host, batched, padded, and computed while the next batch is read."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from dpn_jax.errors import ImageError
from dpn_jax.images.loading import batched, crops
from dpn_jax.images.read import ImageSource
from dpn_jax.images.transform import Transform
from dpn_jax.inference.program import Program
from dpn_jax.inference.throughput import Clock, Throughput

_READ_AHEAD = 2
"""Batches of images prepared ahead of the device."""


@dataclasses.dataclass
class Pipeline:
    """Runs any number of images through a program.

    Args:
      program: from images to logits.
      transform: its `crop` prepares an image; the program normalizes.
      batch_size: images in the largest batch. Smaller ones are padded to a power of two, so that only a few sizes are
        compiled.
      workers: processes that read and prepare images; 0 is a thread for each CPU core.
      throughput: of the last stream that was read to its end; None if that was too short to measure.
    """

    program: Program
    transform: Transform
    batch_size: int
    workers: int = 0
    throughput: Throughput | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def logits(self, images: np.ndarray) -> np.ndarray:
        """See `Classifier.logits`."""
        parts = [images[first : first + self.batch_size] for first in range(0, len(images), self.batch_size)]
        running = [self._dispatch(part, self._padded(len(part))) for part in parts]
        return np.concatenate([
            np.asarray(logits, np.float32)[: len(part)] for logits, part in zip(running, parts, strict=True)
        ])  # fmt: skip

    def stream(
        self, images: Iterable[ImageSource], *, prepared: bool = False, total: int | None = None
    ) -> Iterator[np.ndarray | ImageError]:
        """Yields the logits of each image, float32 `[K]`, or why it cannot be read.

        Args:
          images, prepared, total: as for `Classifier.stream`.

        Raises:
          DataError: a worker process died.
        """
        cores = os.cpu_count() or 1
        clock = Clock(1 if prepared else min(self.workers or cores, cores), read_ahead=_READ_AHEAD)
        reading = self._checked(images, clock) if prepared else self._read(images, clock)
        running: collections.deque[tuple[list[np.ndarray | ImageError], concurrent.futures.Future | None]]
        running = collections.deque()
        size, compiled = self._padded(total) if total else 0, 0
        with contextlib.closing(reading), _watcher() as watcher:
            for batch in batched(reading, self.batch_size):
                good = [image for image in batch if not isinstance(image, ImageError)]
                logits = None
                if good:
                    size = max(size, self._padded(len(good)))  # a smaller last batch: no compilation
                    start = time.perf_counter()
                    computed = self._dispatch(good, size)
                    logits = watcher.submit(clock.wait, computed, start, len(good), compiles=size > compiled)
                    compiled = size
                running.append((batch, logits))
                if len(running) > 1:  # the device computes this batch while the previous one is reported
                    yield from _rows(*running.popleft())
            while running:
                yield from _rows(*running.popleft())
        self.throughput = clock.throughput()

    def _read(self, images: Iterable[ImageSource], clock: Clock) -> Iterator[np.ndarray | ImageError]:
        ahead = _READ_AHEAD * self.batch_size
        return crops(images, self.transform.crop, ahead=ahead, workers=self.workers, on_read=clock.count_prepared)

    def _checked(self, images: Iterable[np.ndarray | ImageError], clock: Clock) -> Iterator[np.ndarray | ImageError]:
        """Prepared images as they come; the time that their source takes is counted."""
        settings = self.transform.preprocessing
        shape = (settings.height, settings.width, len(settings.mean))
        start = time.perf_counter()
        for image in images:
            clock.count_prepared(1, time.perf_counter() - start)
            is_array = isinstance(image, np.ndarray)
            if isinstance(image, ImageError) or (is_array and image.dtype == np.uint8 and image.shape == shape):
                yield image
            else:
                got = f"{image.dtype} {list(image.shape)}" if is_array else type(image).__name__
                yield ImageError(f"a prepared image must be uint8 {list(shape)}, got {got}")
            start = time.perf_counter()

    def _padded(self, count: int) -> int:
        return self.program.rows(min(self.batch_size, 1 << (count - 1).bit_length()))

    def _dispatch(self, images: Sequence[np.ndarray], size: int) -> jax.Array:
        """Pads and dispatches a batch, and returns its logits, padding included, before they are computed."""
        padded = np.zeros((size, *images[0].shape), images[0].dtype)
        np.stack(images, out=padded[: len(images)])
        return self.program(padded)


def _rows(
    batch: list[np.ndarray | ImageError], logits: concurrent.futures.Future | None
) -> Iterator[np.ndarray | ImageError]:
    rows = iter(()) if logits is None else iter(logits.result())
    for image in batch:
        yield image if isinstance(image, ImageError) else next(rows)


@contextlib.contextmanager
def _watcher() -> Iterator[concurrent.futures.Executor]:
    """A thread that waits for the device, and that an abandoned stream does not wait for."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
