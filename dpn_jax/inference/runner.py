"""A model on devices: from images to what it computes of them."""

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dpn_jax.errors import ImageError
from dpn_jax.images.read import ImageSource
from dpn_jax.images.transform import Transform
from dpn_jax.inference.pipeline import Pipeline
from dpn_jax.inference.program import Program
from dpn_jax.inference.throughput import Throughput
from dpn_jax.multihost import merged


class Runner:
    """Runs images through a model: `Classifier` without the names of its classes.

    Args:
      program: from images to logits.
      transform: prepares an image.
      batch_size: images in the largest batch, over all devices.
      workers: processes that read and prepare images; 0 is a thread for each CPU core.
      widths: of the logits and of the features.
      pre_logits: a function of the program's params and images that gives the features; None where there is none.
    """

    def __init__(
        self,
        program: Program,
        transform: Transform,
        batch_size: int,
        workers: int,
        *,
        widths: tuple[int, int],
        pre_logits: Callable[[Any, jax.Array], jax.Array] | None = None,
    ) -> None:
        self._pipeline = Pipeline(program, transform, batch_size, workers)
        self._widths = widths
        self._pre_logits = pre_logits

    @property
    def transform(self) -> Transform:
        """Prepares an image: its `crop` runs on the host, its normalization on the devices."""
        return self._pipeline.transform

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """The devices that it runs on."""
        return tuple(self._pipeline.program.mesh.devices.flat)

    @property
    def batch_size(self) -> int:
        """Images in the largest batch, over all devices."""
        return self._pipeline.batch_size

    @property
    def throughput(self) -> Throughput | None:
        """Of the last stream that was read to its end; None if that was too short to measure."""
        return self._pipeline.throughput

    def stream_logits_in_processes(
        self, images: Sequence[ImageSource], *, prepared: bool = False
    ) -> Iterator[np.ndarray | ImageError]:
        """Computes the logits of a list of images in all processes, as `stream_in_processes` does.

        Args:
          images, prepared: as for `stream_in_processes`.

        Yields:
          In every process, for each image of the whole list, in order, what `stream_logits` yields.

        Raises:
          RunError, DataError: as `stream_in_processes`.
        """
        if jax.process_count() == 1:  # nothing to encode
            return self.stream_logits(images, prepared=prepared, total=len(images))

        def work(indices: Iterator[int]) -> Iterator[str | list[str]]:
            mine = (images[index] for index in indices)
            for row in self.stream_logits(mine, prepared=prepared, total=len(images)):
                yield str(row) if isinstance(row, ImageError) else [base64.b64encode(row.tobytes()).decode()]

        return (
            ImageError(row) if isinstance(row, str) else np.frombuffer(base64.b64decode(row[0]), np.float32)
            for row in merged(work, len(images), unit=self.batch_size)
        )

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Computes the logits of prepared images.

        Args:
          images: `[B, H, W, C]`, from the transform: normalized floats, or uint8 from its `crop`.

        Returns:
          float32 `[B, num_classes]`.
        """
        return self._pipeline.logits(images) if len(images) else np.zeros((0, self._widths[0]), np.float32)

    def stream_logits(
        self, images: Iterable[ImageSource], *, prepared: bool = False, total: int | None = None
    ) -> Iterator[np.ndarray | ImageError]:
        """Computes the logits of any number of images as they come, as `stream` does.

        Args:
          images, prepared, total: as for `stream`.

        Yields:
          For each image, in order, its logits, float32 `[num_classes]`, or the error if it cannot be read.

        Raises:
          DataError: a worker process died.
        """
        return self._pipeline.stream(images, prepared=prepared, total=total)

    def features(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Computes what the classifier reads, for linear probes and retrieval: the pooled features.

        Args:
          images: what `read_image` accepts: paths, PIL images, ...

        Returns:
          float32 `[B, head_features]`.

        Raises:
          ImageError: an image cannot be read.
          ValueError: an exported model, which gives logits only.
        """
        rows = []
        for row in self.stream_features(images):
            if isinstance(row, ImageError):
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.zeros((0, self._widths[1]), np.float32)

    def stream_features(
        self, images: Iterable[ImageSource], *, prepared: bool = False, total: int | None = None
    ) -> Iterator[np.ndarray | ImageError]:
        """Computes the features of any number of images as they come, as `stream_logits` does the logits.

        Args:
          images, prepared, total: as for `stream_logits`.

        Yields:
          For each image, in order, float32 `[head_features]`, or the error if it cannot be read.

        Raises:
          ValueError: an exported model, which gives logits only.
          DataError: a worker process died.
        """
        return self._features.stream(images, prepared=prepared, total=total)

    @functools.cached_property
    def _features(self) -> Pipeline:
        if self._pre_logits is None:
            raise ValueError("an exported model gives logits only; load the weights for features")
        return dataclasses.replace(self._pipeline, program=self._pipeline.program.sharing(self._pre_logits))
