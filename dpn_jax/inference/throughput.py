"""Throughput of a stream of images, and what limits it: the host, which prepares them, or the device."""

import time
from typing import Literal, NamedTuple

import jax
import numpy as np


class Throughput(NamedTuple):
    """Throughput in images/s, in the steady state after compilation."""

    rate: float
    """Host and device together, including the caller's time between images."""
    host: float
    """Of the threads or processes that read and prepare images."""
    device: float
    """Of the device, including copies to and from it."""

    @property
    def limit(self) -> Literal["host", "device"]:
        """The slower of the two.

        Example:
          >>> Throughput(rate=12.3, host=40.1, device=12.5).limit
          'device'
        """
        return "host" if self.host < self.device else "device"


class Clock:
    """Measures one stream.

    Args:
      workers: threads or processes that prepare images at the same time.
      read_ahead: batches that they may be ahead of the device. After a compilation that many are ready, so they are not
        counted.
    """

    def __init__(self, workers: int, *, read_ahead: int) -> None:
        self._workers, self._read_ahead = workers, read_ahead
        self._prepared, self._preparing = 0, 0.0  # images, and seconds summed over all workers
        self._computed, self._computing, self._elapsed = 0, 0.0, 0.0
        self._batches, self._ready = 0, 0.0  # batches since the last compilation, and when the last one was ready

    def count_prepared(self, images: int, seconds: float) -> None:
        """Counts images that took one worker this long."""
        self._prepared += images
        self._preparing += seconds

    def wait(self, logits: jax.Array, start: float, images: int, *, compiles: bool) -> np.ndarray:
        """Waits for a batch and counts it; called in order, on a separate thread, so that the time is the batch's.

        Args:
          logits: `[B, num_classes]`.
          start: `time.perf_counter()` when the batch was dispatched.
          images: number of rows that are not padding.
          compiles: whether the batch was the first of its size, which is compiled.

        Returns:
          The rows that are not padding, float32.
        """
        rows = np.asarray(logits, np.float32)[:images]
        before, self._ready = self._ready, time.perf_counter()
        self._batches = 0 if compiles else self._batches + 1
        if self._batches > self._read_ahead:
            self._computed += images
            self._computing += self._ready - max(start, before)  # until `before` the device computed another batch
            self._elapsed += self._ready - before
        return rows

    def throughput(self) -> Throughput | None:
        """The throughput, or None if there were too few batches to measure it."""
        if not self._computed:
            return None
        return Throughput(
            rate=self._computed / self._elapsed,
            host=self._workers * self._prepared / self._preparing,
            device=self._computed / self._computing,
        )
