"""The transform without timm: sizes and values computed by hand. `parity/` compares with timm."""

import ast
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpn_jax
from dpn_jax import images
from dpn_jax.errors import ImageError
from dpn_jax.images.read import read_image
from dpn_jax.images.transform import Transform, preprocessing
from dpn_jax.pretrained import DPN_MEAN, DPN_STD, PRETRAINED, Preprocessing
from tests.support.photos import skimage_photo


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("path", sorted(Path(images.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_imports_only_pillow_and_numpy(path: Path) -> None:
    """Of what is imported at once; packing and worker processes need more where they are used."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    others = {name.split(".")[0] for name in froms | names} - set(sys.stdlib_module_names)
    assert others <= {"numpy", "PIL", "dpn_jax"}


# Which transform


@pytest.mark.parametrize("tag", PRETRAINED)
@pytest.mark.parametrize("prefix", ["", "timm/"])
def test_tag_gives_its_preprocessing(tag: str, prefix: str) -> None:
    assert preprocessing(prefix + tag) == Transform(PRETRAINED[tag].preprocessing)


def test_use_test_size_where_there_is_one() -> None:
    assert preprocessing("dpn68b.ra_in1k", use_test_size=True).preprocessing.image_size == 288
    assert preprocessing("dpn68b.ra_in1k", use_test_size=True).preprocessing.crop_fraction == 1.0
    assert preprocessing("dpn92.mx_in1k", use_test_size=True) == preprocessing("dpn92.mx_in1k")


def test_options_and_own_preprocessing() -> None:
    settings = Preprocessing(image_size=64, interpolation="nearest")
    assert preprocessing(settings, exif=True) == Transform(settings, exif=True)
    resized = preprocessing("dpn92.mx_in1k", image_size=320)
    assert resized.preprocessing == dataclasses.replace(PRETRAINED["dpn92.mx_in1k"].preprocessing, image_size=320)
    assert len({Transform(settings), Transform(settings), Transform(settings, exif=True)}) == 2
    with pytest.raises(ValueError, match="image_size"):
        preprocessing("dpn92.mx_in1k", image_size=0)


@pytest.mark.parametrize(
    ("name", "hint"), [("dpn92", "dpn92.mx_in1k"), ("dpn68b.ra_in1", "dpn68b.ra_in1k"), ("x", "known: dpn68.mx_in1k")]
)
def test_unknown_tag_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*{hint}"):
        preprocessing(name)


def test_weights_without_a_tag_know_their_transform(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    model = dpn_jax.from_pretrained("dpn_tiny.digits")
    dpn_jax.save(model, file)
    with pytest.raises(ValueError, match=r"give model\.provenance\.preprocessing"):
        preprocessing(str(file))
    model = dpn_jax.load(file)
    assert preprocessing(model.provenance.preprocessing) == preprocessing("dpn_tiny.digits")


@pytest.mark.parametrize("source", [None, 92, ["dpn92.mx_in1k"]])
def test_tag_of_another_type(source: object) -> None:
    with pytest.raises(ValueError, match="unknown model"):
        preprocessing(source)


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 channels \(RGB\) or 1 \(gray\).*\(0.5, 0.5\)"):
        Transform(Preprocessing(mean=(0.5, 0.5), std=(1, 1)))


# Resize and crop


@pytest.mark.parametrize(
    ("size", "fraction", "resized", "corner"),  # width and height; worked out by hand from torchvision's rules
    [
        ((400, 300), 0.875, (341, 256), (58, 16)),  # 341.33 truncated; (341 - 224) / 2 = 58.5 to even
        ((300, 400), 0.875, (256, 341), (16, 58)),
        ((411, 306), 0.875, (343, 256), (60, 16)),  # 343.84 truncated, not 344; 59.5 to even
        ((256, 256), 0.875, (256, 256), (16, 16)),  # as it is
        ((640, 480), 0.95, (313, 235), (44, 6)),  # 235.79 floored; 44.5 and 5.5 to even
        ((7, 5), 1.0, (313, 224), (44, 0)),
        ((1, 1), 0.875, (256, 256), (16, 16)),
        ((1, 50), 0.875, (256, 12800), (16, 6288)),
    ],
)
def test_resize_and_crop_by_hand(
    size: tuple[int, int], fraction: float, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    pixels = noise(size[1], size[0])
    left, top = corner
    expected = Image.fromarray(pixels).resize(resized, Image.Resampling.BICUBIC)
    expected = np.asarray(expected)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(Transform(Preprocessing(crop_fraction=fraction)).crop(pixels), expected)


def test_squash_keeps_the_whole_image() -> None:
    pixels = noise(40, 90)
    expected = Image.fromarray(pixels).resize((64, 32), Image.Resampling.BICUBIC)
    settings = Preprocessing(image_size=(32, 64), crop_fraction=1.0, crop_mode="squash")
    np.testing.assert_array_equal(Transform(settings).crop(pixels), expected)


@pytest.mark.parametrize("wide", [False, True])
def test_border_keeps_the_whole_image_in_the_mean_color(wide: bool) -> None:
    pixels = noise(60, 90) if wide else noise(90, 60)
    settings = Preprocessing(image_size=64, crop_fraction=1.0, crop_mode="border", mean=(1.0, 0.5, 0.0))
    cropped = Transform(settings).crop(pixels)
    size = (64, 43) if wide else (43, 64)  # 42.67 rounded, 10 pixels before and 11 after
    cropped = cropped if wide else cropped.swapaxes(0, 1)
    expected = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(cropped[10:53], expected if wide else expected.swapaxes(0, 1))
    assert (cropped[:10] == (255, 128, 0)).all()
    assert (cropped[53:] == (255, 128, 0)).all()


def test_sizes_that_are_equal_are_one_number() -> None:
    assert Preprocessing(image_size=(64, 64)) == Preprocessing(image_size=64)
    assert Preprocessing(image_size=[64, 32]).image_size == (64, 32)  # as JSON has it
    assert (Preprocessing(image_size=(64, 32)).height, Preprocessing(image_size=(64, 32)).width) == (64, 32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 31),
        ("image_size", (64, 31)),
        ("image_size", (64, 64, 64)),
        ("image_size", (64,)),
        ("image_size", []),
        ("image_size", 64.0),
        ("image_size", True),
        ("image_size", "64"),
        ("image_size", 10**400),
        ("image_size", 70_000),
        ("crop_fraction", 0),
        ("crop_fraction", 1.1),
        ("crop_fraction", "0.9"),
        ("crop_fraction", True),
        ("crop_fraction", 1e-4),
        ("crop_mode", "Center"),
        ("crop_mode", None),
        ("interpolation", "random"),
        ("interpolation", ["bicubic"]),
        ("mean", "555"),
        ("mean", (0.5, float("nan"), 0.5)),
        ("mean", 0.5),
        ("std", (0.0, 1.0, 1.0)),
        ("std", ()),
    ],
)
def test_each_field_by_its_type(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^(mean and |image_size / )?{field}"):
        Preprocessing(**{field: value})


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_interpolations_differ_and_keep_a_flat_image(interpolation: str) -> None:
    transform = Transform(Preprocessing(image_size=32, interpolation=interpolation))
    flat = np.full((50, 70, 3), (10, 100, 200), np.uint8)
    assert (transform.crop(flat) == flat[0, 0]).all()
    others = {"bicubic", "bilinear", "lanczos", "nearest"} - {interpolation}
    for other in others:
        settings = Preprocessing(image_size=32, interpolation=other)
        assert (Transform(settings).crop(noise(50, 70)) != transform.crop(noise(50, 70))).any()


@pytest.mark.parametrize("shape", [(1, 10000), (10000, 1)])
def test_absurdly_narrow_image_is_refused_before_it_is_resized(shape: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"ndarray: .* would be resized to .*2560000.*89,478,485 pixels allowed"):
        preprocessing("dpn92.mx_in1k").crop(np.zeros(shape, np.uint8))


def test_gray_transform_reads_one_channel() -> None:
    transform = Transform(Preprocessing(image_size=32, mean=(0.5,), std=(0.25,)))
    pixels = noise(40, 40)
    cropped = transform.crop(pixels)
    assert cropped.shape == (32, 32, 1)
    expected = Image.fromarray(pixels).convert("L").resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
    np.testing.assert_array_equal(cropped[..., 0], expected)
    assert transform(pixels).shape == (32, 32, 1)


def test_photo_end_to_end() -> None:
    transform = preprocessing("dpn92.mx_in1k")
    prepared = transform(skimage_photo("astronaut.png"))
    assert (prepared.shape, prepared.dtype) == ((224, 224, 3), np.float32)
    photo = np.asarray(Image.open(skimage_photo("astronaut.png")), np.float64) / 255
    middle = photo[32:-32, 32:-32].mean((0, 1))  # 512 pixels resized to 256, of which 16 are cropped at each side
    np.testing.assert_allclose(prepared.mean((0, 1)), (middle - DPN_MEAN) / DPN_STD, atol=0.01)


# Normalize


def test_normalize_every_value_to_half_an_ulp_a_step() -> None:
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    exact = (pixels / 255 - DPN_MEAN) / DPN_STD
    values = preprocessing("dpn92.mx_in1k").normalize(pixels)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, exact, rtol=2e-7, atol=1e-6)
    assert (np.diff(values[0], axis=0) > 0).all()


def test_normalize_takes_batches_and_leaves_its_input_alone() -> None:
    transform = preprocessing("dpn68b.ra_in1k")
    batch = np.stack([noise(8, 9, seed=seed) for seed in range(4)])
    before = batch.copy()
    values = transform.normalize(batch)
    np.testing.assert_array_equal(batch, before)
    for pixels, value in zip(batch, values, strict=True):
        np.testing.assert_array_equal(transform.normalize(pixels), value)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4, 1), np.uint8), np.zeros((), np.uint8)])
def test_normalize_refuses_other_arrays(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[..., 3\], got"):
        preprocessing("dpn92.mx_in1k").normalize(pixels)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(400, 300), (1200, 900), (300, 2400)])
def test_fast_decoding_never_enlarges(size: tuple[int, int], crop_mode: str, tmp_path: Path) -> None:
    """Large JPEG files are read at a part of their size; others, and small ones, stay bit for bit what they were."""
    settings = Preprocessing(image_size=112, crop_mode=crop_mode)  # resized to 128 pixels
    gradient = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    picture = Image.fromarray(np.stack([gradient, gradient.T.reshape(gradient.shape), 255 - gradient], axis=-1))
    for suffix in (".jpg", ".png"):
        path = tmp_path / f"photo{suffix}"
        picture.save(path)
        exact, fast = (Transform(settings, fast_decode=value).crop(path) for value in (False, True))
        scales = suffix == ".jpg" and min(size) >= 256
        assert (exact == fast).all() == (not scales)
        assert np.abs(exact.astype(int) - fast).mean() < 20
    decoded = read_image(tmp_path / "photo.jpg", at_least=128)
    assert min(decoded.size) >= 128
