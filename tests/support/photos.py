"""Real photos, from the samples of scikit-image and scikit-learn."""

from pathlib import Path

import skimage
import sklearn

_SKIMAGE = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png")
_SKIMAGE_MORE = ("retina.jpg", "rocket.jpg", "moon.png", "ihc.png")

PHOTOS = [Path(skimage.__file__).parent / "data" / name for name in (*_SKIMAGE, *_SKIMAGE_MORE)] + [
    Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")
]
