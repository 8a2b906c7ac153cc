"""What a stream of images waits for: the host, which reads and prepares them, or the device."""

import time
from typing import Literal, NamedTuple

import jax
import numpy as np


class Throughput(NamedTuple):
    """How fast images went through, in images/s, once compiled and in its stride."""

    rate: float
    """Both together, with whatever the caller did in between."""
    host: float
    """What the threads that read and prepare images can do."""
    device: float
    """What the device can do, copies to and from it included."""

    @property
    def limit(self) -> Literal["host", "device"]:
        """The slower of the two.

        Example:
          >>> Throughput(rate=12.3, host=40.1, device=12.5).limit
          'device'
        """
        return "host" if self.host < self.device else "device"


class Clock:
    """Takes the times of one stream.

    Args:
      workers: threads that prepare images at the same time.
      read_ahead: batches that they may be ahead of the device. So many are ready after a compilation, and say nothing
        about the host.
    """

    def __init__(self, workers: int, *, read_ahead: int) -> None:
        self._workers, self._read_ahead = workers, read_ahead
        self._prepared, self._preparing = 0, 0.0  # images, and seconds of all threads together
        self._computed, self._computing, self._elapsed = 0, 0.0, 0.0
        self._batches, self._ready = 0, 0.0  # since the last compilation, and when the last of them was done

    def count_prepared(self, seconds: float) -> None:
        """Counts an image that took a thread so long."""
        self._prepared += 1
        self._preparing += seconds

    def wait(self, logits: jax.Array, start: float, images: int, *, compiles: bool) -> np.ndarray:
        """Waits for a batch, on a thread of its own, so that the time is that of the batch; batches come in order.

        Args:
          logits: `[B, num_classes]`.
          start: `time.perf_counter()` when it was dispatched.
          images: how many of the rows are no padding.
          compiles: the program was compiled first.

        Returns:
          Those rows, float32.
        """
        rows = np.asarray(logits, np.float32)[:images]
        before, self._ready = self._ready, time.perf_counter()
        self._batches = 0 if compiles else self._batches + 1
        if self._batches > self._read_ahead:
            self._computed += images
            self._computing += self._ready - max(start, before)  # until then the device was at the batch before
            self._elapsed += self._ready - before
        return rows

    def throughput(self) -> Throughput | None:
        """The rates; None where there were too few batches to tell."""
        if not self._computed:
            return None
        return Throughput(
            rate=self._computed / self._elapsed,
            host=self._workers * self._prepared / self._preparing,
            device=self._computed / self._computing,
        )
