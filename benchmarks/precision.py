"""What a TPU's arithmetic does to the logits, with the same rounding on a CPU: `python -m benchmarks.precision`.

A TPU multiplies bfloat16 numbers. With JAX's default matmul precision it rounds float32 factors to bfloat16 and sums in
float32; with `jax.default_matmul_precision("highest")` it does not round. A bfloat16 model rounds what lies between the
layers too. Beside it, what decoding JPEG files at a part of their size does (`--fast-decode`): files whose shorter side
has 1,024 pixels. Real photos and parts of them; random weights and norm statistics, since the published ones are on the
hub (`--weights` measures a file).
"""

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from PIL import Image

import dpn_jax
from benchmarks.report import print_setting
from dpn_jax.fast.forward import FastForward
from dpn_jax.fast.plan import PLANS
from dpn_jax.images.transform import Transform
from dpn_jax.operations import PLAIN
from dpn_jax.pretrained import default_preprocessing
from tests.support.models import randomize
from tests.support.photos import PHOTOS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    models: tuple[str, ...] = ("dpn68b", "dpn92")
    """Variants."""
    weights: Path | None = None
    """A file of weights of the one variant; defaults to random ones."""
    size: int = 224
    """Side of the images, pixels."""
    photos: int = len(PHOTOS)
    """How many of the photos, each whole and its four quarters."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints a row for each model and arithmetic."""
    report = {"setting": print_setting("benchmarks.precision"), "rows": []}
    print("\n| model | arithmetic | largest error of the logits, of their range | least cosine | same top-1 |")
    print("|---|---|---|---|---|")
    for name in options.models:
        model, half = (built(name, options, dtype) for dtype in ("float32", "bfloat16"))
        images, fast_decoded = photographs(name, options)
        exact = np.asarray(run(model, images), np.float64)
        for arithmetic, logits in {
            "float32, default precision": run(nnx.view(nnx.clone(model), operations=ROUNDED), images),
            "bfloat16": run(half, images),
            "bfloat16, fast form": FastForward(half, PLANS["tpu"])(images),
            "float32, fast decoding": run(model, fast_decoded),
        }.items():
            row = {"model": name, "arithmetic": arithmetic, **compared(exact, np.asarray(logits, np.float64))}
            report["rows"].append(row)
            print("| {model} | {arithmetic} | {error:.1e} | {cosine:.6f} | {top1:.3f} |".format(**row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def rounded(x: jax.Array, kernel: jax.Array, **options: int) -> jax.Array:
    """A convolution whose factors are rounded to bfloat16 and whose sums are float32."""
    if not isinstance(x, jax.Array):
        x = dpn_jax.blocks.join_paths(x)
    x, kernel = (value.astype(jnp.bfloat16).astype(jnp.float32) for value in (x, kernel))
    return PLAIN.convolve(x, kernel, **options)


ROUNDED = dataclasses.replace(PLAIN, convolve=rounded)


def built(name: str, options: Options, dtype: str) -> dpn_jax.DPN:
    """The model, with the file's or random weights and norm statistics."""
    if options.weights:
        return dpn_jax.from_pretrained(options.weights, model=name, dtype=dtype)
    return randomize(dpn_jax.create_model(name, dtype=dtype, rngs=nnx.Rngs(0)))


def photographs(name: str, options: Options) -> tuple[jax.Array, jax.Array]:
    """Normalized photos and quarters of photos, `[B, H, W, 3]`: decoded in full, and at a part of their size."""
    settings = dataclasses.replace(default_preprocessing(dpn_jax.pretrained.get_config(name)), image_size=options.size)
    files = []
    for path in PHOTOS[: options.photos]:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        middle, bottom = photo.width // 2, photo.height // 2
        boxes = [(left, top, left + middle, top + bottom) for left in (0, middle) for top in (0, bottom)]
        for part in (photo, *map(photo.crop, boxes)):
            scale = 1024 / min(part.size)
            file = io.BytesIO()
            part.resize((round(part.width * scale), round(part.height * scale))).save(file, "JPEG", quality=92)
            files.append(file.getvalue())
    exact, fast = (Transform(settings, fast_decode=fast_decode) for fast_decode in (False, True))
    return jnp.stack([exact(file) for file in files]), jnp.stack([fast(file) for file in files])


@jax.jit
def run(model: dpn_jax.DPN, images: jax.Array) -> jax.Array:
    """The plain form."""
    return model(images)


def compared(exact: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """How far logits `[B, K]` are from the exact ones."""
    cosine = (exact * logits).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(logits, axis=1)
    return {
        "error": float(np.abs(logits - exact).max() / np.ptp(exact)),
        "cosine": float(cosine.min()),
        "top1": float((exact.argmax(1) == logits.argmax(1)).mean()),
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
