"""Batches of images: deterministic, prefetched by worker processes, resumable at any batch."""

import dataclasses
import functools
import hashlib
import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from PIL import Image

from dpn_jax.errors import DataError, ImageError
from dpn_jax.finetune.augment import color_jitter, rand_augment, random_crop
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.images.read import ImageSource, read_image
from dpn_jax.images.sources import LabeledImages, prepared, transform_for
from dpn_jax.images.transform import Transform
from dpn_jax.images.workers import prefetched, refuse_in_starting_worker
from dpn_jax.pretrained import Preprocessing

Batch = Mapping[str, jax.Array | np.ndarray]
"""`image`: uint8 `[B, H, W, C]`, or normalized floats. `label`: integers `[B]`, or class probabilities `[B, K]`.
`weight` (optional): `[B]`, how much each image counts, 0 for padding."""

IteratorState = dict[str, int | str]

logger = logging.getLogger("dpn_jax")


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Batches, prefetched by worker processes or threads; see `batches`.

    Its state is the index of the next batch and a fingerprint of the data, whatever the workers have prefetched.
    `close` it, or use it in a `with` statement, to end the workers at once.

    Args:
      source: every batch of the run, by its index; `batches` makes it.
      workers: processes; 0 uses threads.

    Attributes:
      per_epoch: batches in one pass over the data.
    """

    def __init__(self, source: "_Batches", workers: int) -> None:
        self.per_epoch = source.per_epoch
        self._source = source
        self._workers = workers
        self._next = 0
        self._running: Iterator[dict[str, np.ndarray]] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next >= len(self._source):
            raise StopIteration
        if self._running is None:
            self._running = prefetched(self._source, self._workers, start=self._next)
            weakref.finalize(self, self._running.close)  # before the interpreter exits, when Grain can no longer do it
        try:
            batch = next(self._running)
        except BaseException:
            self.close()
            raise
        self._next += 1
        return batch

    def get_state(self) -> IteratorState:
        """What `set_state` of an iterator over the same data needs to continue here; JSON."""
        return {"next_index": self._next, "data": self._source.fingerprint}

    def set_state(self, state: IteratorState) -> None:
        """Continues where `state` was taken.

        Args:
          state: from `get_state`.

        Raises:
          DataError: `state` is of other images, another batch size or another seed.
        """
        if state["data"] != self._source.fingerprint:
            raise DataError(
                "the images, batch_size or seed are not those of the saved run, so it cannot continue with the same "
                "batches; restore them, or start a new run"
            )
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends the workers; asking for another batch starts new ones."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(
    source: LabeledImages,
    config: FinetuneConfig,
    preprocessing: Preprocessing,
    *,
    train: bool,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Reads, augments and batches images.

    Each epoch's order depends only on `config.seed` and the epoch, each image's augmentation on these and its index, so
    that neither the number of workers nor an interruption changes anything. Images stay uint8: the step normalizes.

    Args:
      source: the images: an `ImageFolder`, `PackedImages`, a Hugging Face `datasets.Dataset`, or anything else with
        `len()` and `[index]`, whose items are an image, as `read_image` accepts it, and its class. Packed crops are
        augmented as if they were photos.
      config: batch size, seed, workers, augmentation; `image_size`, if set, overrides that of `preprocessing`.
      preprocessing: size, interpolation, and channels (RGB, or gray if `mean` has one value).
      train: True: shuffled and augmented; drops an incomplete last batch of an epoch. False: in order, with timm's
        evaluation crop; pads the last batch of an epoch with images of zeros whose weight is 0.
      epochs: passes over the images; defaults to endless for training and one otherwise.
      process_index, process_count: index of this host and number of hosts; each gets its slice of every batch.

    Returns:
      An iterator over {'image': uint8 [B, S, S, C], 'label': int32 [B], 'weight': float32 [B]}, B being
      `config.batch_size / process_count`. Iterating raises DataError if an image cannot be read (unless
      `config.skip_broken` is set) or a worker dies.

    Raises:
      DataError: a training batch is larger than the data, the images would not be square, or they are packed crops
        that would be used as they are and have another geometry.
      ValueError: `process_count` does not divide the batch size, `preprocessing` has neither 1 nor 3 channels, or the
        sampling needs labels that the source does not tell.

    Example:
      >>> source = [("cat/1.png", 0), ("dog/1.png", 1), ("dog/2.png", 1)]
      >>> batches(source, FinetuneConfig(batch_size=2), Preprocessing(), train=True).per_epoch
      1
    """
    refuse_in_starting_worker()
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in [0, {process_count}), got {process_index!r}")
    if config.batch_size % process_count:
        raise ValueError(f"batch_size must be a multiple of the {process_count} processes, got {config.batch_size}")
    if train and config.batch_size > len(source):
        raise DataError(f"batch_size {config.batch_size} is larger than the {len(source)} training images; lower it")
    if train and config.sampling == "balanced" and not hasattr(source, "labels"):
        raise ValueError("sampling='balanced' needs to know every label: a source with `labels`, as an ImageFolder has")
    if config.image_size is not None:
        preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    if preprocessing.height != preprocessing.width:
        size = f"{preprocessing.height} x {preprocessing.width}"
        raise DataError(f"training images are square, but those of the weights are {size} pixels; pass --image-size")
    if epochs is None and not train:
        epochs = 1
    transform = Transform(preprocessing)
    if not train or not _crops_at_random(config):
        try:
            transform = transform_for(source, preprocessing)
        except ImageError as error:
            raise DataError(str(error)) from error
    return BatchIterator(
        _Batches(source, config, transform, train, epochs, process_index, process_count), config.workers
    )


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 0]).permutation(size)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The batches of a run by index: the source of Grain's workers."""

    source: LabeledImages
    config: FinetuneConfig
    transform: Transform
    train: bool
    epochs: int | None
    process_index: int
    process_count: int

    @property
    def per_epoch(self) -> int:
        rounded = math.floor if self.train else math.ceil
        return rounded(len(self.source) / self.config.batch_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the order of the images; of an unknown source, its length only."""
        digest = hashlib.blake2b(digest_size=16)
        told = (self.train, self.config.batch_size, self.config.seed)
        digest.update(repr(told if self.config.sampling == "shuffled" else (*told, self.config.sampling)).encode())
        digest.update(getattr(self.source, "identity", b"%d" % len(self.source)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * self.per_epoch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, number = divmod(index, self.per_epoch)
        config, size, total = self.config, self.transform.preprocessing.image_size, len(self.source)
        is_drawn = self.train and config.sampling == "balanced"
        shuffled = self.train and not is_drawn
        order = self._drawn(epoch) if is_drawn else _order(config.seed, epoch, total) if shuffled else range(total)
        count = config.batch_size // self.process_count
        first = number * config.batch_size + self.process_index * count
        batch = {
            "image": np.zeros((count, size, size, len(self.transform.preprocessing.mean)), np.uint8),
            "label": np.zeros(count, np.int32),
            "weight": np.zeros(count, np.float32),
        }
        for row, chosen in enumerate(order[first : first + count]):
            # an image that is drawn twice is augmented in two ways
            if found := self._read(epoch, int(chosen), total + first + row if is_drawn else int(chosen)):
                batch["image"][row], batch["label"][row] = found
                batch["weight"][row] = 1
        return batch

    @functools.cached_property
    def _drawn(self) -> Callable[[int], np.ndarray]:
        """For each epoch as many images as there are, drawn so that each class has the same chance."""
        labels = np.array(self.source.labels)
        chances = 1 / np.bincount(labels)[labels]
        seed, chances = self.config.seed, chances / chances.sum()

        @functools.lru_cache(maxsize=2)
        def drawn(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch, 0]).choice(len(labels), len(labels), p=chances)

        return drawn

    def _read(self, epoch: int, chosen: int, augmentation: int) -> tuple[np.ndarray, int] | None:
        """An image, augmented in the way of this number, and its label.

        Of one that is skipped: in training the next, in validation None.

        Source: `timm.data.dataset.ImageDataset` for the next.
        """
        total, skipped = len(self.source), getattr(self.source, "skipped", frozenset())
        problem = ""
        for index in (number % total for number in range(chosen, chosen + (total if self.train else 1))):
            if index in skipped:
                continue
            try:
                return prepared(self.source, index, functools.partial(self._prepare, epoch, augmentation))
            except ImageError as error:
                if not self.config.skip_broken:
                    raise DataError(
                        f"{error}; repair or remove it and continue with --resume, or without such files with "
                        "--resume --skip-broken"
                    ) from error
                problem = str(error)
                _warn_once(f"skipped: {problem}")
        if self.train:
            raise DataError(f"none of the {total} images can be read: {problem or 'all are skipped'}")
        return None

    def _prepare(self, epoch: int, augmentation: int, image: ImageSource) -> np.ndarray:
        """uint8 [S, S, C]."""
        if not self.train:
            return self.transform.crop(image)
        generator = np.random.default_rng([self.config.seed, epoch, augmentation + 1])
        return _augmented(image, self.config, self.transform, generator)


def _crops_at_random(config: FinetuneConfig) -> bool:
    return config.crop_scale != (1, 1)


def _augmented(
    source: ImageSource, config: FinetuneConfig, transform: Transform, generator: np.random.Generator
) -> np.ndarray:
    """uint8 [S, S, C], in timm's order: `timm.data.transforms_factory.transforms_imagenet_train`."""
    settings = transform.preprocessing
    size, channels = settings.image_size, len(settings.mean)
    if not _crops_at_random(config):
        pixels = transform.crop(source)
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    else:
        scale, ratio = config.crop_scale, config.crop_ratio
        # the smallest possible crop must not be enlarged unless full decoding would enlarge it too
        at_least = math.ceil(size / math.sqrt(scale[0] * min(ratio[0], 1 / ratio[1], 1)))
        image = read_image(source, mode="L" if channels == 1 else "RGB", at_least=at_least)
        image = random_crop(image, size, generator, scale=scale, ratio=ratio, interpolation=settings.interpolation)
    if generator.random() < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.randaugment:
        fill = tuple(min(255, round(255 * mean)) for mean in settings.mean)
        image = rand_augment(
            image, generator, magnitude=config.randaugment, layers=config.randaugment_layers,
            fill=fill[0] if channels == 1 else fill,
        )  # fmt: skip
    if config.color_jitter:
        image = color_jitter(image, config.color_jitter, generator)
    return np.asarray(image).reshape(size, size, channels)
