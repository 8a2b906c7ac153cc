"""Whether the host keeps a classifier fed: `python -m benchmarks.classify`.

JPEG photos of 500 x 375 pixels, in the page cache, are decoded and cropped, by threads and by worker processes; read by
torch's DataLoader with timm's transform, by as many workers; run through a model that has them as crops; and classified
end to end. All take turns in one run; the figures are medians, images/s. On a CPU the model computes on the same cores
that decode: what end to end can reach at most is 1 / (1 / decoding + 1 / model). On an accelerator it is the slower of
the two.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from PIL import Image

import dpn_jax
from benchmarks.report import print_setting
from convert.timm_import import import_timm
from dpn_jax.images.loading import crops
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing, default_preprocessing

SAMPLES = Path(__file__).parents[1] / "samples"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = "dpn_tiny"
    """Variant."""
    photos: int = 768
    """Photos in a turn."""
    size: int = 224
    """Side of the images, pixels."""
    batch_size: int = 32
    """Images in a batch."""
    workers: int = 2
    """Processes that read images."""
    rounds: int = 5
    """Turns of each."""
    torch: bool = True
    """Measure torch's DataLoader too."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints images a second."""
    report = {"setting": print_setting("benchmarks.classify"), **dataclasses.asdict(options), "json": None}
    model = dpn_jax.create_model(options.model, rngs=nnx.Rngs(0))
    transform = Transform(dataclasses.replace(default_preprocessing(model.config), image_size=options.size))
    settings = {"transform": transform, "batch_size": options.batch_size}
    threads, processes = (dpn_jax.Classifier(model, workers=workers, **settings) for workers in (0, options.workers))
    with tempfile.TemporaryDirectory() as folder:
        files = fill(Path(folder), options.photos)
        prepared = [transform.crop(file) for file in files]
        ahead = 2 * options.batch_size
        ways: dict[str, Callable[[], Iterable[object]]] = {
            "decoding, threads": lambda: crops(files, transform.crop, ahead=ahead),
            "decoding, processes": lambda: crops(files, transform.crop, ahead=ahead, workers=options.workers),
            "model": lambda: threads.stream(prepared, prepared=True),
            "end to end, threads": lambda: threads.stream(files),
            "end to end, processes": lambda: processes.stream(files),
        }
        if options.torch:
            ways["torch's DataLoader"] = lambda: dataloader(files, transform.preprocessing, options)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                times[name].append(seconds_each(way(), options))
    rates = report["images_per_second"] = {name: 1 / float(np.median(taken[1:])) for name, taken in times.items()}
    print(f"\n{options.model}, {options.size} pixels, batch {options.batch_size}, {options.workers} workers, images/s:")
    for name, rate in rates.items():
        print(f"{name:<24}{rate:8.0f}")
    report["of the slower"] = {
        kind: rates[f"end to end, {kind}"] / min(rates[f"decoding, {kind}"], rates["model"])
        for kind in ("threads", "processes")
    }
    report["of the most"] = {
        kind: rates[f"end to end, {kind}"] * (1 / rates[f"decoding, {kind}"] + 1 / rates["model"])
        for kind in ("threads", "processes")
    }
    bars = {"of the slower": "the slower of the two", "of the most": "the most that one machine's cores allow"}
    for what, by in bars.items():
        print("end to end by {}: {threads:.2f} with threads, {processes:.2f} with processes".format(by, **report[what]))
    if options.torch:
        report["by torch"] = rates["decoding, processes"] / rates["torch's DataLoader"]
        print(f"decoding in processes by torch's DataLoader: {report['by torch']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def fill(folder: Path, count: int) -> list[str]:
    """Photos of 500 x 375 pixels, each another part of a sample."""
    samples = [Image.open(SAMPLES / name).convert("RGB") for name in ("cat.jpg", "coffee.jpg")]
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        sample = samples[number % len(samples)]
        width = int(rng.integers(sample.width // 2, sample.width + 1))
        height = min(width * 3 // 4, sample.height)
        left, top = rng.integers(0, sample.width - width + 1), rng.integers(0, sample.height - height + 1)
        part = sample.resize((500, 375), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        part.save(folder / f"{number}.jpg", quality=92)
        files.append(str(folder / f"{number}.jpg"))
    return files


def seconds_each(results: Iterable[object], options: Options) -> float:
    """Seconds an image, from the moment that each worker has given a batch to the last image.

    Not what starts and ends processes, which takes torch's workers seconds, and what compiles.
    """
    count, start, end = 0, 0.0, 0.0
    for result in results:
        count += getattr(result, "batch", 1)
        end = time.perf_counter()
        if not start and count >= options.batch_size * max(options.workers, 1):
            count, start = 0, end
    return (end - start) / count


class Batch:
    """What the DataLoader gives at a time."""

    def __init__(self, images: int) -> None:
        self.batch = images


def dataloader(files: list[str], preprocessing: Preprocessing, options: Options) -> Iterable[Batch]:
    """timm's evaluation transform in torch's DataLoader."""
    import_timm()
    import torch

    loader = torch.utils.data.DataLoader(
        Photos(files, preprocessing), batch_size=options.batch_size, num_workers=options.workers,
        multiprocessing_context="spawn",  # a fork of a process that runs JAX may hang
    )  # fmt: skip
    for batch in loader:
        yield Batch(len(batch))


@dataclasses.dataclass(frozen=True)
class Photos:
    """A torch data set of photos."""

    files: list[str]
    preprocessing: Preprocessing

    @functools.cached_property
    def prepare(self) -> Callable[[Image.Image], object]:
        """timm's transform; made in the worker that uses it."""
        settings = self.preprocessing
        return import_timm().data.create_transform(
            (3, settings.height, settings.width), interpolation=settings.interpolation, mean=settings.mean,
            std=settings.std, crop_pct=settings.crop_fraction,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> object:
        with Image.open(self.files[index]) as image:
            return self.prepare(image.convert("RGB"))


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", None)
    sys.exit(main(tyro.cli(Options)))
