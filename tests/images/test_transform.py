"""What images become, without timm: hand-computed sizes, modes, orientations, labels. `parity/` compares with timm."""

import ast
import dataclasses
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_jax import images
from dpn_jax.errors import ImageError
from dpn_jax.images.folders import image_files
from dpn_jax.images.labels import imagenet_labels, read_labels
from dpn_jax.images.read import read_image
from dpn_jax.images.transform import Transform, preprocessing
from dpn_jax.pretrained import DPN_MEAN, DPN_STD, PRETRAINED, Preprocessing


def skimage_photo(name: str) -> Path:
    return Path(pytest.importorskip("skimage").__file__).parent / "data" / name


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("path", sorted(Path(images.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_imports_only_pillow_and_numpy(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
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


# Reading


def test_sources_agree() -> None:
    path = skimage_photo("chelsea.png")
    transform = preprocessing("dpn92.mx_in1k")
    with Image.open(path) as image:
        array = np.asarray(image)
        crops = [transform.crop(source) for source in (path, str(path), image, array, np.asfortranarray(array))]
    for crop in crops[1:]:
        np.testing.assert_array_equal(crop, crops[0])


def test_source_image_and_array_stay_as_they_are() -> None:
    image = Image.fromarray(noise(4, 4))
    read = read_image(image)
    read.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(image, noise(4, 4))
    array = noise(4, 4)
    read_image(array).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(array, noise(4, 4))
    palette = Image.fromarray(noise(4, 4)).quantize(8)
    read_image(palette)
    assert palette.mode == "P"


def test_array_layouts() -> None:
    gray = noise(4, 5, 1)
    for array in (gray, gray[..., 0]):
        np.testing.assert_array_equal(read_image(array), np.repeat(gray, 3, axis=2))
    np.testing.assert_array_equal(read_image(noise(4, 5, 4)), noise(4, 5, 4)[..., :3])


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def same_as_pillow(path: Path) -> np.ndarray:
    """Reads `path`, after checking it against Pillow's own conversion, which is what timm gets."""
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        expected = {mode: np.asarray(image.convert(mode)) for mode in ("RGB", "L")}
    for mode, pixels in expected.items():
        read = read_image(path, mode=mode)
        assert (type(read), read.mode) == (Image.Image, mode)
        np.testing.assert_array_equal(read, pixels)
    return expected["RGB"]


def test_rgba_drops_alpha(tmp_path: Path) -> None:
    pixels = noise(6, 7, 4)
    np.testing.assert_array_equal(same_as_pillow(save(tmp_path / "a.png", Image.fromarray(pixels))), pixels[..., :3])


def test_gray_and_gray_alpha(tmp_path: Path) -> None:
    gray = noise(6, 7, 1)
    expected = np.repeat(gray, 3, axis=2)
    np.testing.assert_array_equal(same_as_pillow(save(tmp_path / "l.png", Image.fromarray(gray[..., 0]))), expected)
    la = Image.merge("LA", [Image.fromarray(gray[..., 0])] * 2)
    np.testing.assert_array_equal(same_as_pillow(save(tmp_path / "la.png", la)), expected)


def test_bilevel(tmp_path: Path) -> None:
    image = Image.fromarray(noise(6, 7, 1)[..., 0]).convert("1")
    assert set(np.unique(same_as_pillow(save(tmp_path / "1.png", image)))) == {0, 255}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 4))], ids=["one entry", "every entry"])
def test_palette_with_alpha(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(noise(16, 16)).quantize(64)
    path = save(tmp_path / "p.png", image, transparency=transparency)
    np.testing.assert_array_equal(same_as_pillow(path), image.convert("RGB"))


def test_16_bit_gray_is_clipped_like_pillow(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 255, 256, 4096, 65535]], np.uint16))
    assert same_as_pillow(save(tmp_path / "16.png", image))[0, :, 0].tolist() == [0, 1, 255, 255, 255, 255]
    same_as_pillow(save(tmp_path / "16.tif", image))


def test_float_tiff(tmp_path: Path) -> None:
    same_as_pillow(save(tmp_path / "f.tif", Image.fromarray(np.linspace(-9, 300, 20, dtype=np.float32).reshape(4, 5))))


def test_ycbcr_tiff(tmp_path: Path) -> None:
    path = save(tmp_path / "ycbcr.tif", Image.fromarray(noise(6, 7)).convert("YCbCr"))
    with Image.open(path) as image:
        assert image.mode == "YCbCr"  # whose conversion to gray is not that of its conversion to RGB
    same_as_pillow(path)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    assert (abs(same_as_pillow(path).astype(int) - (0, 255, 255)) <= 2).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_only_the_first_frame(tmp_path: Path, suffix: str) -> None:
    red, blue = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"frames{suffix}", red, save_all=True, append_images=[blue, red], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (same_as_pillow(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm"])
def test_formats_and_a_misleading_suffix(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, Image.fromarray(noise(8, 8)))
    pixels = same_as_pillow(path)
    np.testing.assert_array_equal(read_image(path.rename(tmp_path / "wrong.txt")), pixels)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_tiff_compressions(tmp_path: Path, compression: str) -> None:
    same_as_pillow(save(tmp_path / "a.tif", Image.fromarray(noise(33, 21)), compression=compression))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of `pixels`, from the EXIF standard: row 0 is the visual top, right, bottom or left."""
    rows = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]][(orientation - 1) % 4]
    if orientation <= 4:
        return rows
    transposed = {5: pixels, 6: pixels[::-1], 7: pixels[::-1, ::-1], 8: pixels[:, ::-1]}[orientation]
    return transposed.transpose(1, 0, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_exif_orientation_is_off_unless_asked_for(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = noise(3, 5)
    tags = Image.Exif()
    tags[0x0112] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", Image.fromarray(pixels), exif=tags, **options)
    plain = turned(pixels, orientation) if suffix == ".tif" else pixels  # Pillow itself turns TIFF, for timm as well
    np.testing.assert_array_equal(same_as_pillow(path), plain)
    np.testing.assert_array_equal(read_image(path, exif=True), turned(pixels, orientation))


def test_exif_orientation_6_of_a_jpeg_reaches_the_transform(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    path = save(tmp_path / "a.jpg", Image.fromarray(noise(40, 60)), exif=tags)
    upright = np.rot90(read_image(path), -1)
    settings = Preprocessing(image_size=32)
    np.testing.assert_array_equal(Transform(settings, exif=True).crop(path), Transform(settings).crop(upright))
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(image, exif=True), upright)


# Labels


def test_imagenet_labels() -> None:
    labels = imagenet_labels()
    assert len(labels) == 1000 == len({label.synset for label in labels})
    assert labels is imagenet_labels()
    assert (labels[281].synset, labels[281].name) == ("n02123045", "tabby, tabby cat")
    assert labels[207].name == "golden retriever"
    assert labels[999].name.startswith("toilet tissue")
    assert all(label.synset[0] == "n" and label.synset[1:].isdigit() and label.name.strip() for label in labels)


@pytest.mark.parametrize(
    "text", ["cat\ndog\nfüchse\n", "cat\ndog\nfüchse", "\ufeffcat\r\ndog\r\nfüchse\r\n", " cat\ndog \nfüchse\n\n\n"]
)
def test_read_labels(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode())
    assert read_labels(path, 3) == ("cat", "dog", "füchse")


def test_read_labels_splits_only_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("a\x0bb\u2028c\nd".encode())
    assert read_labels(tmp_path / "labels.txt", 2) == ("a\x0bb\u2028c", "d")


@pytest.mark.parametrize(("text", "found"), [("a\nb\n", 2), ("", 0), ("\n\n", 0), ("a\nb\nc\nd\n", 4)])
def test_read_labels_of_another_length(tmp_path: Path, text: str, found: int) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"labels.txt: label file has {found} labels.* has 3 classes"):
        read_labels(tmp_path / "labels.txt", 3)


def test_read_labels_missing_or_not_text(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="no such label file"):
            read_labels(path, 3)
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"labels\.txt: label file cannot be read as UTF-8"):
        read_labels(tmp_path / "labels.txt", 1)


# Folders


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_image_files_are_found_by_suffix_and_sorted(tmp_path: Path) -> None:
    names = ["b/2.JPG", "b/10.jpeg", "a.png", "c/d/e.WebP", "z.tif", "y.gif", "x.bmp", "w.ppm"]
    paths = [touch(tmp_path / name) for name in names]
    for other in ("notes.txt", "b/labels.csv", "jpg", "a.png.part"):
        touch(tmp_path / other)
    (tmp_path / "folder.jpg").mkdir()
    assert image_files(tmp_path) == sorted(paths)
    assert image_files(str(tmp_path)) == sorted(paths)


def test_image_files_follow_links_but_no_loops(tmp_path: Path) -> None:
    photo = touch(tmp_path / "data" / "cat" / "1.jpg")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(".")
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "broken.jpg").symlink_to("nowhere")  # listed, so that reading it says what is wrong
    data = tmp_path / "data"
    assert image_files(data) == sorted([photo, data / "dog" / "2.jpg", data / "broken.jpg"])


def test_image_files_with_odd_names(tmp_path: Path) -> None:
    names = [b"\xff.jpg", b"a\nb.jpg", b"c.jpg"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert sorted(os.fsencode(path.name) for path in image_files(tmp_path)) == sorted(names)


def test_image_files_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none: No such file or directory"):
        image_files(tmp_path / "none")
    with pytest.raises(ImageError, match=r"a\.png: Not a directory"):
        image_files(touch(tmp_path / "a.png"))
