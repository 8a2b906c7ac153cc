"""Photos read ahead of a device, in order: by threads of this process, or by worker processes."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import numpy as np
from PIL import Image

from dpn_jax.errors import DataError, ImageError
from dpn_jax.images.read import ImageSource, source_name
from dpn_jax.images.workers import death, interrupts_held, refuse_in_starting_worker, start_worker

Crop = Callable[[ImageSource], np.ndarray]
Item = TypeVar("Item")

_CHUNK = 8
"""Images in one message to a worker and back."""


def crops(
    images: Iterable[ImageSource],
    crop: Crop,
    *,
    ahead: int,
    workers: int = 0,
    on_read: Callable[[int, float], None] = lambda images, seconds: None,
) -> Iterator[np.ndarray | ImageError]:
    """Reads and crops images, in order and ahead.

    Threads are enough for a few cores, as Pillow releases the GIL when it decodes and resizes. Many cores need
    processes.

    Args:
      images: any number; only what is read ahead is taken from it.
      crop: such as `Transform.crop`; picklable if there are workers.
      ahead: images to read ahead.
      workers: number of processes; 0 is a thread for each CPU core.
      on_read: called with a number of images and the seconds that one worker or thread took for them.

    Yields:
      For each image what `crop` returns, or the ImageError that it raises.

    Raises:
      DataError: a worker died.
    """
    if workers:
        refuse_in_starting_worker()
        images = map(_sendable, images)
    chunk = _CHUNK if workers else 1
    pending: collections.deque[concurrent.futures.Future] = collections.deque()

    def first() -> Iterator[np.ndarray | ImageError]:
        cropped, seconds = pending.popleft().result()
        on_read(len(cropped), seconds)
        yield from cropped

    with _pool(workers) as pool:
        try:
            for part in batched(images, chunk):
                with interrupts_held(workers):  # the first ones start the processes
                    pending.append(pool.submit(_cropped, crop, part))
                if len(pending) * chunk > ahead:
                    yield from first()
            while pending:
                yield from first()
        except BrokenProcessPool as error:
            raise DataError(death(_exit_code(_processes(pool)))) from error


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.Executor]:
    """Threads or processes, which are not waited for when a stream is abandoned."""
    if workers:
        context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start_worker)
    else:
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _processes(pool: concurrent.futures.Executor) -> list[multiprocessing.Process]:
    return list((getattr(pool, "_processes", None) or {}).values())


def _exit_code(processes: list[multiprocessing.Process]) -> int | None:
    """That of the process which died first; the pool then ends the others with SIGTERM, and takes a while to know."""
    end = time.monotonic() + 5
    while True:
        codes = [process.exitcode for process in processes]
        died = [code for code in codes if code and code != -signal.SIGTERM]
        if died or None not in codes or time.monotonic() > end:
            return next(iter([*died, *filter(None, codes)]), None)
        time.sleep(0.01)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one of what is left.

    Example:
      >>> list(batched("abcde", 2))
      [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _cropped(crop: Crop, images: list[ImageSource | ImageError]) -> tuple[list[np.ndarray | ImageError], float]:
    """Runs in a thread or worker."""
    start = time.perf_counter()
    results = []
    for image in images:
        try:
            results.append(image if isinstance(image, ImageError) else crop(image))
        except ImageError as error:
            results.append(error)
    return results, time.perf_counter() - start


def _sendable(image: ImageSource) -> ImageSource | ImageError:
    """What a worker process can be sent."""
    if hasattr(image, "read") and not isinstance(image, Image.Image):
        return ImageError(f"{source_name(image)}: an open file cannot be sent to a worker; pass its path or its bytes")
    return image
