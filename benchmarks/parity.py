"""How equal the port is to timm: `python -m benchmarks.parity`, the table in the README.

timm's models with random norm statistics and affine parameters (the published weights are on the hub, which this
command does not need), on real photos prepared as for the variant's default weights. The errors are the largest of any
stage, the features, the pooled features and the logits.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro

from benchmarks.report import print_setting
from convert.verify import compare
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import default_preprocessing, get_config
from tests.support import timm_models
from tests.support.photos import PHOTOS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    models: tuple[str, ...] = timm_models.VARIANTS
    """Variants."""
    photos: int = len(PHOTOS)
    """How many of the photos."""


def main(options: Options) -> None:
    """Prints a row for each variant."""
    print_setting("benchmarks.parity")
    photos = PHOTOS[: options.photos]
    print(f"\n| variant | float64 | float32 | top-5 of {len(photos)} photos |\n|---|---|---|---|")
    for variant in options.models:
        transform = Transform(default_preprocessing(get_config(variant)))
        images = np.stack([transform(photo) for photo in photos])
        with tempfile.TemporaryDirectory() as folder:
            path = timm_models.save_timm(timm_models.randomized(variant), Path(folder) / f"{variant}.safetensors")
            *double, top5_double = compare(path, images, "float64")
            *single, top5_single = compare(path, images, "float32")
        equal = top5_double.largest == top5_single.largest == 0
        worst = [max(row.relative for row in rows) for rows in (double, single)]
        print(f"| {variant} | {worst[0]:.1e} | {worst[1]:.1e} | {'equal' if equal else 'DIFFERENT'} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
