"""The prepared images are timm's, bit for bit: the pixels before normalization and the floats after it."""

import dataclasses
import functools
import importlib.util
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tests.support.timm_models")
pytest.importorskip("tests.support.photos")
import torch

from dpn_jax.checkpoint.timm_config import read_timm_config
from dpn_jax.errors import ImageError
from dpn_jax.images.labels import imagenet_labels
from dpn_jax.images.transform import Transform, preprocessing
from dpn_jax.pretrained import CROP_MODES, INTERPOLATIONS, PRETRAINED, Preprocessing
from tests.support.timm_models import timm

_PACKAGES = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("skimage", "sklearn")}
PHOTOS = sorted(
    [
        *(_PACKAGES["skimage"] / "data").glob("*.jpg"),
        *(_PACKAGES["skimage"] / "data").glob("*.png"),
        *(_PACKAGES["skimage"] / "data").glob("*.gif"),
        _PACKAGES["skimage"] / "data" / "multipage.tif",  # Pillow does not read multipage_rgb.tif
        *(_PACKAGES["sklearn"] / "datasets" / "images").glob("*.jpg"),
    ]
)
VARIED = [path for path in PHOTOS if path.stem in ("astronaut", "camera", "china", "flower", "rocket", "logo")]
TimmTransform = Callable[[Image.Image], torch.Tensor]


def timm_transform(settings: Preprocessing, **options: object) -> TimmTransform:
    return timm.data.create_transform(
        input_size=(len(settings.mean), settings.height, settings.width),
        is_training=False,
        crop_pct=settings.crop_fraction,
        crop_mode=settings.crop_mode,
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        **options,
    )


def timm_image(path: Path, mode: str = "RGB") -> Image.Image:
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        return image.convert(mode)


def same(tensor: torch.Tensor, array: np.ndarray) -> None:
    expected = np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())
    assert (expected.dtype, expected.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(expected.view(np.uint8), array.view(np.uint8))  # the bits: 0.0 is not -0.0


def check(settings: Preprocessing, image: Image.Image) -> None:
    transform = Transform(settings)
    pixels = transform.crop(image)
    same(timm_transform(settings, normalize=False)(image), pixels)
    same(timm_transform(settings)(image), transform.normalize(pixels))


@functools.cache
def timm_model(tag: str) -> torch.nn.Module:
    with torch.device("meta"):  # no weights: only its pretrained_cfg is asked for
        return timm.create_model(tag)


def test_photos_are_there() -> None:
    assert len(PHOTOS) >= 25 and len(VARIED) == 6
    assert {path.suffix for path in PHOTOS} == {".jpg", ".png", ".gif", ".tif"}


@pytest.mark.parametrize("use_test_size", [False, True])
@pytest.mark.parametrize("tag", [name for name, tag in PRETRAINED.items() if not tag.packaged])
def test_every_tag_on_real_photos(tag: str, use_test_size: bool) -> None:
    config = timm.data.resolve_data_config({}, model=timm_model(tag), use_test_size=use_test_size)
    reference = timm.data.create_transform(**config, is_training=False)
    unnormalized = timm.data.create_transform(**config, is_training=False, normalize=False)
    transform = preprocessing(tag, use_test_size=use_test_size)
    for path in VARIED:
        image = timm_image(path)
        same(unnormalized(image), transform.crop(path))
        same(reference(image), transform(path))


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_every_photo(path: Path) -> None:
    """Gray, palettes, alpha, bilevel, frames: whatever scikit-image has lying about."""
    transform = preprocessing("dpn92.mx_in1k")
    same(timm_transform(transform.preprocessing)(timm_image(path)), transform(path))
    gray = Preprocessing(mean=(0.5,), std=(0.2,))
    same(timm_transform(gray)(timm_image(path, "L")), Transform(gray)(path))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_fraction", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("image_size", [32, 224, 225, 288])
def test_settings(image_size: int, crop_fraction: float, interpolation: str) -> None:
    settings = Preprocessing(image_size=image_size, crop_fraction=crop_fraction, interpolation=interpolation)
    for path in VARIED[:3]:
        check(settings, timm_image(path))


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("crop_fraction", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("image_size", [64, (64, 96), (161, 96), (224, 225)])
def test_crop_modes(image_size: int | tuple[int, int], crop_fraction: float, crop_mode: str) -> None:
    settings = Preprocessing(image_size=image_size, crop_fraction=crop_fraction, crop_mode=crop_mode)
    for path in VARIED[:3]:
        check(settings, timm_image(path))
    gray = dataclasses.replace(settings, mean=(0.4,), std=(0.2,))
    transform = timm_transform(gray)
    same(transform(timm_image(VARIED[0], "L")), Transform(gray)(VARIED[0]))


@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_crop_modes_of_random_sizes(crop_mode: str) -> None:
    rng = random.Random(crop_mode)
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for _ in range(150):
        settings = Preprocessing(
            image_size=(rng.randint(32, 80), rng.randint(32, 80)),
            crop_fraction=rng.choice([0.875, 0.95, 1.0, rng.uniform(0.2, 1)]),
            interpolation=rng.choice(INTERPOLATIONS),
            crop_mode=crop_mode,
            mean=tuple(rng.uniform(0, 1) for _ in range(3)),
        )
        height, width = (rng.choice([rng.randint(1, 40), rng.randint(1, 400)]) for _ in range(2))
        image = Image.fromarray(pixels[:height, :width])
        try:
            expected = timm_transform(settings, normalize=False)(image)
        except ValueError:  # so narrow that the shorter side would be 0 pixels
            with pytest.raises(ImageError, match=r"would be resized to .* nothing; crop the image first"):
                Transform(settings).crop(np.asarray(image))
        else:
            same(expected, Transform(settings).crop(np.asarray(image)))


@pytest.mark.parametrize("mean", [(0.0, 0.5, 1.0), (-0.2, 1.3, 0.5)])
def test_borders_of_any_mean(mean: tuple[float, ...]) -> None:
    settings = Preprocessing(image_size=(50, 32), crop_mode="border", mean=mean)
    check(settings, timm_image(VARIED[0]))


@pytest.mark.parametrize(
    "fields",
    [
        {"input_size": [3, 64, 96], "crop_mode": "squash", "crop_pct": 0.9},
        {"input_size": [3, 96, 64], "crop_mode": "border", "interpolation": "lanczos", "crop_pct": 1},
        {"input_size": [3, 64, 64], "mean": [0.5], "std": [0.2], "crop_pct": 0},
        {"input_size": [3, 64, 64], "mean": [], "std": None, "crop_mode": "", "interpolation": ""},
        {},
    ],
)
def test_config_json_as_timm_reads_it(fields: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architecture": "dpn68", "pretrained_cfg": fields}))
    pretrained_cfg, _, _ = timm.models._hub.load_model_config_from_path(tmp_path)
    config = timm.data.resolve_data_config({}, pretrained_cfg=pretrained_cfg)
    reference = timm.data.create_transform(**config, is_training=False)
    transform = Transform(read_timm_config(path).preprocessing)
    for photo in VARIED[:2]:
        same(reference(timm_image(photo)), transform(photo))


@pytest.mark.parametrize(
    "size",
    [
        *[(1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 500), (31, 33), (1000, 7), (7, 1000), (640, 480), (481, 641)],
        *[(223, 225), (224, 224), (255, 256), (256, 256), (257, 256), (341, 256), (411, 306), (306, 411)],
    ],
)
@pytest.mark.parametrize("tag", ["dpn92.mx_in1k", "dpn68b.ra_in1k"])
def test_odd_sizes(tag: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    check(PRETRAINED[tag].preprocessing, Image.fromarray(pixels))


def test_random_sizes() -> None:
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for _ in range(150):
        settings = Preprocessing(
            image_size=rng.randint(32, 80),
            crop_fraction=rng.choice([0.875, 0.95, 1.0, rng.uniform(0.2, 1)]),
            interpolation=rng.choice(["bicubic", "bilinear", "lanczos", "nearest"]),
        )
        size = [rng.choice([rng.randint(1, 40), rng.randint(1, 400)]) for _ in range(2)]
        check(settings, Image.fromarray(pixels[: size[0], : size[1]]))


def test_10000_pixels_long_with_sizes_that_fit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 10000, 3), np.uint8)
    settings = Preprocessing(image_size=32, crop_fraction=1.0)  # 32 x 320,000
    check(settings, Image.fromarray(pixels))
    check(settings, Image.fromarray(pixels.reshape(10000, 1, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1365), (1365, 1)])
def test_the_narrowest_image_that_is_not_refused(size: tuple[int, int]) -> None:
    settings = PRETRAINED["dpn92.mx_in1k"].preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    check(settings, Image.fromarray(pixels))
    with pytest.raises(ImageError, match="would be resized"):
        Transform(settings).crop(np.zeros((size[0] + (size[0] > 1), size[1] + (size[1] > 1)), np.uint8))


def test_timm_dataset_reads_the_same_files(tmp_path: Path) -> None:
    """Through timm's own folder reader, with files of every mode that it might meet."""
    photo = timm_image(VARIED[0]).resize((60, 45))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "exif.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("L").save(tmp_path / "gray.png")
    photo.quantize(64).save(tmp_path / "palette.png", transparency=bytes(range(64)))
    Image.merge("RGBA", [*photo.split(), photo.convert("L")]).save(tmp_path / "alpha.png")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    photo.save(tmp_path / "animated.gif", save_all=True, append_images=[photo.rotate(90)])
    (tmp_path / "animated.gif").rename(tmp_path / "animated.png")  # timm goes by content too
    transform = preprocessing("dpn68b.ra_in1k")
    dataset = timm.data.ImageDataset(str(tmp_path), transform=timm_transform(transform.preprocessing))
    assert len(dataset) == 7
    with warnings.catch_warnings(action="ignore"):
        for index in range(len(dataset)):
            same(dataset[index][0], transform(dataset.filename(index, absolute=True)))


def test_labels() -> None:
    info = timm.data.ImageNetInfo()
    for index, label in enumerate(imagenet_labels()):
        assert label == (info.index_to_label_name(index), info.index_to_description(index))
    assert info.num_classes() == len(imagenet_labels())
