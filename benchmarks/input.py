"""Whether reading and augmenting images holds training up, and what packing saves: `python -m benchmarks.input`.

The same training steps, once over a folder of real photos that are decoded, cropped and augmented as they come, and
once over one batch that is there already. Both take turns in one run; the figure is the ratio of the medians.

Before that, one thread reads the photos for inference, without a network: files that it decodes and crops, and packed
crops, one by one in random order and in batches. These take turns too; all are in the page cache.
"""

import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx

import dpn_jax
from benchmarks.report import print_setting
from dpn_jax.finetune import FinetuneConfig, TrainState, batches, image_folder, make_optimizer, train_step
from dpn_jax.images.pack import pack
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing, default_preprocessing, get_config

PHOTOS = Path(__file__).parents[1] / "samples"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = "dpn68b"
    """Variant."""
    batch_size: int = 16
    """Images in a batch."""
    size: int = 224
    """Side of the images, pixels."""
    workers: int = 2
    """Processes that read images; 0 for threads."""
    steps: int = 5
    """Steps in a turn."""
    rounds: int = 4
    """Turns of each."""
    reading_only: bool = False
    """Only read; train nothing."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints images a second, read and trained on."""
    report = {"setting": print_setting("benchmarks.input"), **dataclasses.asdict(options), "json": None}
    preprocessing = dataclasses.replace(default_preprocessing(get_config(options.model)), image_size=options.size)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        fill(photos, options.batch_size)
        report["reading"] = reading(photos, Path(folder) / "crops", preprocessing, options)
        if not options.reading_only:
            report |= training(photos, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def reading(photos: Path, packed: Path, preprocessing: Preprocessing, options: Options) -> dict[str, float]:
    """Images a second that one thread reads: photos, and the same packed as crops."""
    pack(photos, packed, crops=preprocessing, workers=options.workers)
    files, crops = image_folder(photos, split="all").files, PackedImages(packed)
    transform = Transform(preprocessing)
    order = [int(index) for index in np.random.default_rng(0).permutation(len(crops))]
    chunks = [order[first : first + options.batch_size] for first in range(0, len(order), options.batch_size)]
    ways = {
        "decoded": lambda: [transform.crop(files[index]) for index in order],
        "packed": lambda: [crops[index] for index in order],
        "packed, in batches": lambda: [crops.__getitems__(chunk) for chunk in chunks],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, read in ways.items():
            start = time.perf_counter()
            read()
            times[name].append(time.perf_counter() - start)
    rate = {name: len(order) / float(np.median(taken[1:])) for name, taken in times.items()}  # the first one opened
    ratio = rate["packed"] / rate["decoded"]
    print(f"\nreading photos for {options.size} pixels in one thread, images/s:")
    print(", ".join(f"{name} {value:.0f}" for name, value in rate.items()) + f"; packed by decoded {ratio:.1f}")
    return {**rate, "ratio": ratio}


def training(photos: Path, options: Options) -> dict[str, object]:
    """Images a second that are trained on, from files and from memory."""
    config = FinetuneConfig(
        batch_size=options.batch_size, workers=options.workers, image_size=options.size, color_jitter=0.4, randaugment=5
    )
    model = dpn_jax.create_model(options.model, num_classes=2, rngs=nnx.Rngs(0))
    state = TrainState.create(model, make_optimizer(config, model), config)
    times: dict[str, list[float]] = {"files": [], "memory": []}
    images = image_folder(photos, split="all")
    with batches(images, config, default_preprocessing(model.config), train=True) as read:
        sources = {"files": read, "memory": itertools.repeat(next(read))}
        for source in (read, *(sources[name] for _ in range(options.rounds) for name in times)):
            state, seconds = turn(state, source, options.steps)
            times["memory" if source is sources["memory"] else "files"].append(seconds)
    times["files"].pop(0)  # that one compiled
    rate = {name: options.batch_size * options.steps / float(np.median(taken)) for name, taken in times.items()}
    ratio = rate["files"] / rate["memory"]
    print(f"\n{options.model}, {options.size} pixels, batch {options.batch_size}, {options.workers} workers, images/s:")
    print(f"from files {rate['files']:.2f}, from memory {rate['memory']:.2f}, ratio {ratio:.2f}")
    return {"images_per_second": rate, "ratio": ratio}


def fill(folder: Path, each: int) -> None:
    """Two classes of photos: as many copies of the samples as a batch needs."""
    for photo in (PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"):
        (folder / photo.stem).mkdir(parents=True)
        for number in range(each):
            shutil.copy(photo, folder / photo.stem / f"{number}.jpg")


def turn(state: TrainState, source: Iterator[dict[str, np.ndarray]], steps: int) -> tuple[TrainState, float]:
    """Some steps, and how long they took."""
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = train_step(state, next(source))
    jax.block_until_ready(metrics)
    return state, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
