"""Whether reading and augmenting images holds training up: `python -m benchmarks.input`.

The same training steps, once over a folder of real photos that are decoded, cropped and augmented as they come, and
once over one batch that is there already. Both take turns in one run; the figure is the ratio of the medians.
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
from dpn_jax.pretrained import default_preprocessing

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
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints images a second from files and from memory."""
    report = {"setting": print_setting("benchmarks.input"), **dataclasses.asdict(options), "json": None}
    config = FinetuneConfig(
        batch_size=options.batch_size, workers=options.workers, image_size=options.size, color_jitter=0.4, randaugment=5
    )
    model = dpn_jax.create_model(options.model, num_classes=2, rngs=nnx.Rngs(0))
    state = TrainState.create(model, make_optimizer(config, model), config)
    times: dict[str, list[float]] = {"files": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), options.batch_size)
        images = image_folder(folder, split="all")
        with batches(images, config, default_preprocessing(model.config), train=True) as read:
            sources = {"files": read, "memory": itertools.repeat(next(read))}
            for source in (read, *(sources[name] for _ in range(options.rounds) for name in times)):
                state, seconds = turn(state, source, options.steps)
                times["memory" if source is sources["memory"] else "files"].append(seconds)
    times["files"].pop(0)  # that one compiled
    rate = {name: options.batch_size * options.steps / float(np.median(taken)) for name, taken in times.items()}
    report |= {"images_per_second": rate, "ratio": rate["files"] / rate["memory"]}
    print(f"\n{options.model}, {options.size} pixels, batch {options.batch_size}, {options.workers} workers, images/s:")
    print(f"from files {rate['files']:.2f}, from memory {rate['memory']:.2f}, ratio {report['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def fill(folder: Path, each: int) -> None:
    """Two classes of photos: as many copies of the samples as a batch needs."""
    for photo in (PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"):
        (folder / photo.stem).mkdir()
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
