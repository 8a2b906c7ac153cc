"""What is read, by Pillow's rules: sources, modes, frames, orientations. `parity/` compares with timm."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_jax.images.read import FORMATS, read_image
from dpn_jax.images.transform import Transform, preprocessing
from dpn_jax.pretrained import Preprocessing
from tests.support.photos import skimage_photo


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


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
        if image.mode == "RGB":
            pytest.skip("this Pillow converts it to RGB as it opens it")
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


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF codec")
def test_avif(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue")]
    same_as_pillow(save(tmp_path / "a.avif", Image.fromarray(noise(33, 21))))
    path = save(tmp_path / "b.avif", frames[0], save_all=True, append_images=frames[1:])
    assert same_as_pillow(path)[..., 0].min() > 200, "the first frame"


class Stream(io.RawIOBase):
    """Bytes that come in small pieces and cannot be read twice, as from a socket."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        return self.data.readinto(memoryview(buffer)[:1000])


def test_bytes_and_file_objects_are_read_like_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(noise(40, 60)))
    data, expected = path.read_bytes(), np.asarray(read_image(path))
    for source in (data, bytearray(data), memoryview(data), memoryview(data).cast("B"), io.BytesIO(data), Stream(data)):
        np.testing.assert_array_equal(read_image(source), expected)
    opened = io.BytesIO(b"header" + data)
    opened.seek(len(b"header"))
    np.testing.assert_array_equal(read_image(opened), expected)
    assert not opened.closed and opened.read() == b""
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_image(file, at_least=5), read_image(path, at_least=5))


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
