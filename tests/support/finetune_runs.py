"""A folder of images, a file of weights and the real command, small enough to be run and killed many times."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax import Preprocessing
from tests.support.models import TINY

COLORS = ("blue", "green", "red")


def write_images(folder: Path, count: int = 10) -> Path:
    """Class folders of tinted noise, which a small network learns in a few steps."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(reversed(COLORS)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 120, (36, 40, 3))
            pixels[:, :, channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def write_weights(path: Path) -> Path:
    """Five classes without names, images of 32 pixels."""
    model = dpn_jax.create_model(TINY.replace(depths=(1, 1)), rngs=nnx.Rngs(0))  # traced by every process
    model.provenance = model.provenance._replace(preprocessing=Preprocessing(image_size=32))
    dpn_jax.save(model, path)
    return path


class Runs:
    """Runs the real `dpn-jax finetune` in new processes, on the same images from the same weights.

    Args:
      folder: holds the images, the weights and JAX's compilation cache.
    """

    def __init__(self, folder: Path) -> None:
        self.images = write_images(folder / "images")
        self.weights = write_weights(folder / "tiny.safetensors")
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.environment = os.environ | cache

    def words(self, output: Path, *options: object) -> list[str]:
        """The arguments of the command: 3 epochs of 4 batches, a checkpoint after each of them."""
        start = ["finetune", self.images, "--weights", self.weights, "--output", output]
        choices = ["--epochs", 3, "--batch-size", 6, "--workers", 0, "--checkpoint-every", 1]
        augmentation = ["--mixup", 0.2, "--drop-rate", 0.1, "--ema-decay", 0.9, "--learning-rate", 0.02]
        return [str(word) for word in (*start, *choices, *augmentation, *options)]

    def start(self, output: Path, *options: object, **environment: str) -> subprocess.Popen[str]:
        """Starts the command."""
        return self.call(self.words(output, *options), **environment)

    def call(self, words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Starts `dpn-jax` with these words."""
        return subprocess.Popen(
            [sys.executable, "-m", "dpn_jax", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment | environment,
        )

    def run(self, output: Path, *options: object) -> tuple[int, str, str]:
        """Runs the command to its end: exit code, stdout, stderr."""
        return finish(self.start(output, *options))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for the command: exit code, stdout, stderr."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str], *, every: float = 0.01) -> bool:
    """Waits until `happened()`; False if the process ended before."""
    while not happened():
        if process.poll() is not None:
            return False
        time.sleep(every)
    return True


def contents(output: Path) -> dict[str, bytes]:
    """The files of a run that must not depend on how often it was interrupted."""
    report = sorted(f"report/{path.name}" for path in (output / "report").glob("*"))
    return {name: (output / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors", *report)}
