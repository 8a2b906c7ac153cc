"""Photos read ahead: in order, by threads or processes, whatever happens to them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_jax.errors import DataError, ImageError
from dpn_jax.images.loading import batched, crops
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing

TRANSFORM = Transform(Preprocessing(image_size=32))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Of every brightness, the third of them broken."""
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for number, file in enumerate(files):
        Image.new("RGB", (40, 50), (number, number, number)).save(file)
    files[2].write_bytes(b"no image")
    return files


class Slow(Transform):
    """Takes longer for the first images than for the last."""

    def crop(self, source: Path) -> np.ndarray:
        """Waits first."""
        time.sleep(max(0, 0.05 - 0.005 * int(source.stem)))
        return super().crop(source)


def brightness(results: Iterator[np.ndarray | ImageError]) -> list[int]:
    return [-1 if isinstance(result, ImageError) else int(result.mean()) for result in results]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_in_order_and_ahead(photos: list[Path], workers: int) -> None:
    taken, read = [], []
    sources = (taken.append(file) or file for file in photos)
    results = crops(
        sources, Slow(TRANSFORM.preprocessing).crop, ahead=8, workers=workers,
        on_read=lambda images, seconds: read.append((images, seconds)),
    )  # fmt: skip
    first = next(results)
    assert first.dtype == np.uint8
    assert first.shape == (32, 32, 3)
    assert len(taken) in (9, 16)  # in eights to a worker
    assert [0, *brightness(results)] == [0, 1, -1, *range(3, 40)]
    assert sum(images for images, _ in read) == 40
    assert all(seconds > 0 for _, seconds in read)


@pytest.mark.slow
def test_a_dead_worker_is_told(photos: list[Path]) -> None:
    results = crops(photos * 20, Slow(TRANSFORM.preprocessing).crop, ahead=16, workers=1)
    next(results)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process that reads images died \(exit code -9\): killed"):
        list(results)


@pytest.mark.slow
def test_an_abandoned_stream_ends_its_workers(photos: list[Path]) -> None:
    results = crops(photos * 20, TRANSFORM.crop, ahead=16, workers=2)
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    # not `join`: a thread of the pool's waits for the same process, and a second one is told at once that there is none
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_read_anything_but_open_files(photos: list[Path]) -> None:
    with photos[5].open("rb") as opened, Image.open(photos[6]) as picture:
        sources = [opened, picture, photos[7].read_bytes(), np.full((40, 50, 3), 8, np.uint8), str(photos[9])]
        results = list(crops(sources, TRANSFORM.crop, ahead=8, workers=1))
    assert "5.png: an open file cannot be sent to a worker; pass its path or its bytes" in str(results[0])
    assert brightness(iter(results[1:])) == [6, 7, 8, 9]


def test_batches_are_taken_one_at_a_time() -> None:
    numbers = iter(range(7))
    batches = batched(numbers, 3)
    assert next(batches) == [0, 1, 2]
    assert next(numbers) == 3
    assert list(batches) == [[4, 5, 6]]
