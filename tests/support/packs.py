"""Class folders of small images, packed."""

from pathlib import Path

import numpy as np
from PIL import Image

from dpn_jax.images.pack import pack
from dpn_jax.images.packed import PackedImages
from dpn_jax.pretrained import Preprocessing

CROPS = Preprocessing(image_size=32)


def write_classes(root: Path, count: int = 7, *, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """`count` images of noise in each class, no two alike."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (36, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def packed(root: Path, folder: Path, *, crops: Preprocessing | None = None, shard_size: int = 4) -> PackedImages:
    """Packs in this process."""
    pack(root, folder, crops=crops, shard_size=shard_size, workers=0)
    return PackedImages(folder)
