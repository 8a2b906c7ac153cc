"""Real photos, from the samples of scikit-image and scikit-learn."""

import importlib.util
from pathlib import Path

import pytest

_SKIMAGE = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png")
_SKIMAGE_MORE = ("retina.jpg", "rocket.jpg", "moon.png", "ihc.png")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec else Path(package)  # where it is not installed, no such file


PHOTOS = [_folder("skimage") / "data" / name for name in (*_SKIMAGE, *_SKIMAGE_MORE)] + [
    _folder("sklearn") / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")
]


def skimage_photo(name: str) -> Path:
    """One of scikit-image's samples; where that is not installed the test is skipped."""
    pytest.importorskip("skimage")
    return _folder("skimage") / "data" / name
