"""Augmentation: ranges and rates of the draws, and the same operations as timm's."""

import math
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dpn_jax.finetune.augment import OPERATIONS, color_jitter, crop_box, rand_augment, random_crop

TIMM_NAMES = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY",
    "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["RGB", "L"])
def photo(request: pytest.FixtureRequest, generator: np.random.Generator) -> Image.Image:
    """Smooth, so that interpolation matters, and neither square nor using every value."""
    noise = generator.integers(20, 230, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((48, 36)).convert(request.param)


def test_crops_keep_to_scale_and_ratio(generator: np.random.Generator) -> None:
    width, height, scale, ratio = 400, 300, (0.2, 0.6), (0.5, 2.0)
    boxes = np.array([crop_box(width, height, generator, scale=scale, ratio=ratio) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0 and right.max() == width and bottom.max() == height
    area = (right - left) * (bottom - top) / (width * height)
    aspect = np.log((right - left) / (bottom - top))
    assert scale[0] - 0.01 < area.min() < 0.22 and 0.58 < area.max() < scale[1] + 0.01
    assert abs(aspect).max() < math.log(2.0) + 0.02 and aspect.min() < -0.6 and aspect.max() > 0.6
    assert abs(np.mean(area) - 0.4) < 0.03  # a little less than even: large boxes of extreme ratios do not fit


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 700)])
def test_a_crop_that_never_fits_is_timms_central_one(
    timm: ModuleType, size: tuple[int, int], generator: np.random.Generator
) -> None:
    scale, ratio = (1.0, 1.0), (0.75, 1.2)
    top, left, height, width = timm.data.transforms.RandomResizedCropAndInterpolation.get_params(
        Image.new("L", size), scale, ratio
    )
    assert crop_box(*size, generator, scale=scale, ratio=ratio) == (left, top, left + width, top + height)


def test_random_crop_is_the_box_resized(photo: Image.Image) -> None:
    options = {"scale": (0.3, 0.5), "ratio": (0.75, 4 / 3)}
    box = crop_box(*photo.size, np.random.default_rng(3), **options)
    cropped = random_crop(photo, 20, np.random.default_rng(3), **options, interpolation="lanczos")
    assert cropped == photo.crop(box).resize((20, 20), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("magnitude", [1, 5, 9, 10])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_timms(
    timm: ModuleType, photo: Image.Image, name: str, magnitude: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = timm.data.auto_augment
    fill = 99 if photo.mode == "L" else (99, 88, 77)
    parameters = {"img_mean": fill, "interpolation": Image.Resampling.BILINEAR}
    if name == "posterize" and magnitude == 10:
        monkeypatch.setitem(
            module.LEVEL_TO_ARG, TIMM_NAMES[name], lambda *_: (1,)
        )  # 0 bits, which newer Pillow refuses
    operation = module.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=magnitude, hparams=parameters)
    for sign in (1, -1):
        monkeypatch.setattr(module, "_randomly_negate", lambda value, sign=sign: sign * value)
        assert OPERATIONS[name](photo, sign * magnitude / 10, fill) == operation(photo), f"{name} {sign}"


def test_randaugment_draws_timms_operations_evenly(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [TIMM_NAMES[name] for name in OPERATIONS] == timm.data.auto_augment._RAND_INCREASING_TRANSFORMS
    calls: list[tuple[str, float]] = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, level, fill, name=name: calls.append((name, level)) or image
        )
    generator = np.random.default_rng(0)
    for _ in range(3000):
        rand_augment(Image.new("L", (1, 1)), generator, magnitude=7, layers=2, fill=0)
    assert 0.47 < len(calls) / 6000 < 0.53, "each layer is applied half of the time"
    counts = [sum(called == name for called, _ in calls) / len(calls) for name in OPERATIONS]
    assert min(counts) > 0.05 and max(counts) < 0.085
    assert {level for _, level in calls} == {0.7, -0.7}
    assert 0.45 < sum(level > 0 for _, level in calls) / len(calls) < 0.55


def test_color_jitter_moves_within_its_range(generator: np.random.Generator) -> None:
    gray = Image.new("RGB", (4, 4), (100, 100, 100))  # neither contrast nor saturation changes it
    values = np.array([np.asarray(color_jitter(gray, 0.4, generator))[0, 0, 0] for _ in range(500)])
    assert 60 <= values.min() < 65 and 135 < values.max() <= 140
    color = Image.new("RGB", (4, 4), (200, 100, 50))  # saturation and brightness only: the ratio of differences stays
    spread = np.array([np.ptp(np.asarray(color_jitter(color, 0.4, generator))[0, 0].astype(int)) for _ in range(500)])
    assert spread.min() < 90 < 200 < spread.max()
    assert color_jitter(color, 0.0, generator) == color


def test_color_jitter_draws_the_order(monkeypatch: pytest.MonkeyPatch, generator: np.random.Generator) -> None:
    calls: list[str] = []
    for name in ("Brightness", "Contrast", "Color"):
        kind = getattr(ImageEnhance, name)
        monkeypatch.setattr(ImageEnhance, name, lambda image, n=name, kind=kind: calls.append(n) or kind(image))
    for _ in range(100):
        color_jitter(Image.new("L", (1, 1)), 0.1, generator)
    assert len({tuple(calls[start : start + 3]) for start in range(0, 300, 3)}) == 6


def test_the_same_generator_gives_the_same_image(photo: Image.Image) -> None:
    def augmented(seed: int) -> Image.Image:
        generator = np.random.default_rng(seed)
        fill = 0 if photo.mode == "L" else (0, 0, 0)
        image = random_crop(photo, 24, generator, scale=(0.2, 1), ratio=(0.5, 2))
        return color_jitter(rand_augment(image, generator, magnitude=9, layers=3, fill=fill), 0.3, generator)

    assert augmented(5) == augmented(5) != augmented(6)
    assert augmented(5).mode == photo.mode and augmented(5).size == (24, 24)
