"""Writes scikit-learn's handwritten digits as a folder of class folders: `python -m recipes.digits_folder digits`.

1,797 pictures of 8x8 pixels with 17 grays (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0), four times
enlarged: `train/<digit>/` and, every fifth of each digit, `val/<digit>/`.
"""

import sys
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 32


def main(folder: tyro.conf.Positional[Path], /, *, per_class: int | None = None) -> None:
    """Write the digits.

    Args:
      folder: the folder to make; it must not exist.
      per_class: of each digit, train on so many only.
    """
    folder.mkdir(parents=True)
    digits = load_digits()
    seen, written = dict.fromkeys(range(10), 0), 0
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split, trained = ("val" if seen[digit] % 5 == 4 else "train"), seen[digit] - seen[digit] // 5
        seen[digit] += 1
        if split == "train" and per_class is not None and trained >= per_class:
            continue
        written += 1
        path = folder / split / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8))
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
    print(f"{folder.name}: {written} digits")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
