"""Every image that cannot be read gives one `ImageError` in one printable line."""

import io
import os
import random
import resource
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from dpn_jax.errors import ImageError
from dpn_jax.images import read
from dpn_jax.images.read import FORMATS as READ
from dpn_jax.images.read import MAX_PIXELS, SUFFIXES, UNSUPPORTED_SUFFIXES, read_image
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing

SMALL = Transform(Preprocessing(image_size=32), exif=True)
FORMATS = ("jpeg", "png", "gif", "webp", "bmp", "tiff", "ppm", *(["avif"] if "AVIF" in READ else []))


@pytest.fixture(autouse=True)
def every_file_is_closed() -> Iterator[None]:
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.exists() else 0
    yield
    assert not folder.exists() or len(list(folder.iterdir())) <= before


def photo(height: int = 40, width: int = 56) -> Image.Image:
    """A smooth picture with some noise: it compresses, but not to nothing."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5, columns * 4, rows + columns], -1) + np.random.default_rng(0).integers(
        0, 20, (height, width, 3)
    )
    return Image.fromarray((pixels % 256).astype(np.uint8))


def encoded(name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, name, **options)
    return buffer.getvalue()


def refused(source: object, reason: str) -> str:
    """Checks that `source` is refused for `reason`, by the transform too, and returns the message."""
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(source)
    message = str(caught.value)
    assert message.isprintable()  # so in one line as well
    if hasattr(source, "seek"):
        source.seek(0)
    with pytest.raises(ImageError, match=reason):
        SMALL(source)
    return message


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Files that are no images


def test_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jpg", "No such file").startswith(f"{tmp_path}/none.jpg: ")


def test_missing_folder_broken_link_and_loop(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "a.jpg", "No such file")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    refused(tmp_path / "broken.jpg", r"broken\.jpg: No such file")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    refused(tmp_path / "loop.jpg", r"loop\.jpg: ")


def test_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder.*image_files")
    refused("", "is a folder")


def test_empty_file(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.jpg", b""), r"a\.jpg: the file is empty \(0 bytes\)")


def test_text_named_jpg(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.jpg", b"hello, I am no image\n" * 50), r"a\.jpg: not an image, or damaged.*JPEG, PNG")


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"SIMPLE  =                    T" + b" " * 50 + b"BITPIX  =                    8".ljust(2800),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["pdf", "eps", "fits", "svg"],
)
def test_document_named_jpg(tmp_path: Path, data: bytes) -> None:
    refused(write(tmp_path / "a.jpg", data), "not an image, or damaged")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\x0a\xfa\x7f\x01\x90", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", "JPEG XL"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
    ],
)
def test_formats_of_phones_and_cameras_are_named(tmp_path: Path, data: bytes, kind: str) -> None:
    for source in (write(tmp_path / "a.jpg", data * 9), data * 9):
        refused(source, f": is {kind}, which this Pillow cannot read; convert it to JPEG or PNG$")


def test_suffixes_of_unsupported_formats(tmp_path: Path) -> None:
    assert not SUFFIXES & UNSUPPORTED_SUFFIXES.keys()
    for suffix, kind in UNSUPPORTED_SUFFIXES.items():
        refused(write(tmp_path / f"a{suffix.upper()}", b"something"), f"is {kind}, which")
        np.testing.assert_array_equal(read_image(write(tmp_path / f"a{suffix}", encoded("png"))), photo())


@pytest.mark.skipif("AVIF" not in READ, reason="this Pillow has no AVIF codec")
def test_avif_without_its_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.avif", encoded("avif"))
    refused(write(tmp_path / "b.avif", encoded("avif")[:60]), "not an image, or damaged")
    monkeypatch.setattr(read, "FORMATS", [name for name in READ if name != "AVIF"])
    refused(path, r"a\.avif: is AVIF, which this Pillow cannot read; convert")


@pytest.mark.parametrize("name", ["tga", "ico", "pcx", "eps", "sgi"])
def test_format_that_pillow_knows_but_we_do_not_read(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path / "a.jpg", encoded(name)), "not an image, or damaged")


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    caught: list[str] = []
    thread = threading.Thread(target=lambda: caught.append(refused(tmp_path / "a.jpg", "regular")), daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert caught == [f"{tmp_path}/a.jpg: is not a regular file"]


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/random"])
def test_device(path: str) -> None:
    refused(path, "is not a regular file")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.png", encoded("png"))

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", deny)  # not chmod: the tests may run as root
    assert refused(path, "Permission denied") == f"{path}: Permission denied"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\nlines"), "two lines"),
        (SyntaxError("color \x1b[31m"), r"'color \\x1b\[31m'"),
        (MemoryError(), "MemoryError"),
        (struct.error("short"), "short"),
    ],
)
def test_whatever_pillow_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    path = write(tmp_path / "a.png", encoded("png"))

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    refused(path, rf"a\.png: {reason}$")


@pytest.mark.parametrize("source", [None, 3, ["a.jpg"]])
def test_source_of_another_type(source: object) -> None:
    refused(source, "expected a path, bytes, a binary file object, a PIL image or a NumPy array, got")


# Bytes and file objects


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_content_that_is_no_image(kind: type) -> None:
    assert refused(kind(b"\xff" * 400_000), "not an image, or damaged").startswith(f"{kind.__name__}: ")
    refused(kind(b"a.jpg"), "not an image, or damaged")  # bytes are content, never a path
    refused(kind(encoded("jpeg")[:-40]), f"{kind.__name__}: image file is truncated")
    refused(kind(png(20_000, 20_000)), "pixels")
    refused(kind(b""), r"is empty \(0 bytes\)")


def test_a_file_object_is_named_and_left_open(tmp_path: Path) -> None:
    with write(tmp_path / "a.jpg", b"text").open("rb") as file:
        assert refused(file, "not an image").startswith(f"{tmp_path}/a.jpg: ")
        assert not file.closed
    with (tmp_path / "a.jpg").open(encoding="utf-8") as file:
        refused(file, r"a\.jpg: a bytes-like object is required, not 'str'")
    with pytest.raises(ImageError, match=r"a\.jpg: I/O operation on closed file"):
        read_image(file)


def test_a_file_object_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_BYTES", 2**22)
    with Path("/dev/zero").open("rb") as endless:
        assert refused(endless, "more than the 4,194,304 bytes allowed").startswith("/dev/zero: ")


# Names


def test_name_with_a_newline(tmp_path: Path) -> None:
    assert r"two\nlines.jpg'" in refused(write(tmp_path / "two\nlines.jpg", b"text"), "not an image")
    photo().save(tmp_path / "two\nlines.png")
    np.testing.assert_array_equal(read_image(tmp_path / "two\nlines.png"), photo())


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    bad = write(tmp_path / os.fsdecode(b"caf\xe9.jpg"), b"text")
    assert r"caf\udce9.jpg'" in refused(bad, "not an image")
    good = write(tmp_path / os.fsdecode(b"caf\xe9.png"), encoded("png"))
    for source in (good, str(good)):
        np.testing.assert_array_equal(read_image(source), photo())
    assert SMALL(good).shape == (32, 32, 3)


def test_path_like_of_bytes(tmp_path: Path) -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path / "a.png")

    refused(BytesPath(), r"a\.png: No such file")
    write(tmp_path / "a.png", encoded("png"))
    np.testing.assert_array_equal(read_image(BytesPath()), photo())


def test_name_with_a_null_or_too_long() -> None:
    refused("a\0b.jpg", r"'a\\x00b.jpg': .*null")
    refused("a" * 5000 + ".jpg", "too long")


def test_name_in_the_message_of_a_pil_image(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", encoded("jpeg")[:-40])
    with Image.open(path) as image:
        refused(image, r"a\.jpg: image file is truncated")
    refused(Image.new("RGB", (0, 5)), "PIL image: the image has no pixels, its size is 0 x 5")


# Damaged images


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_is_never_filled_up(tmp_path: Path, name: str) -> None:
    data, path = encoded(name), tmp_path / "a.jpg"
    without_pixels = {"png": 4 + 4 + 12, "gif": 2}.get(name, 0)  # two checksums and the end marker
    for count in [*range(0, len(data) - 60, 23), *range(len(data) - 60, len(data) - without_pixels - 1)]:
        with pytest.raises(ImageError, match=r"a\.jpg: "):
            read_image(write(path, data[:count]))
    whole = np.asarray(read_image(write(path, data)))
    for count in range(len(data) - without_pixels, len(data)):
        np.testing.assert_array_equal(read_image(write(path, data[:count])), whole)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}])
def test_truncated_jpeg_says_so(tmp_path: Path, options: dict[str, object]) -> None:
    data = encoded("jpeg", **options)
    for cut in (1, 2, 50):
        refused(write(tmp_path / "a.jpg", data[:-cut]), r"a\.jpg: image file is truncated")


def test_truncated_png_says_so(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.png", encoded("png")[:-200]), r"a\.png: image file is truncated")


@pytest.mark.parametrize(("name", "marker"), [("jpeg", b"\xff\xda"), ("png", b"IDAT")])
def test_damaged_in_the_middle(tmp_path: Path, name: str, marker: bytes) -> None:
    data = bytearray(encoded(name))
    place = data.index(marker) + 4
    data[place : place + 8] = b"\xff" * 8
    refused(write(tmp_path / "a.jpg", data), r"a\.jpg: broken data stream")


def test_filling_up_is_refused_where_the_application_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    refused(write(tmp_path / "a.jpg", encoded("jpeg")[:-40]), "LOAD_TRUNCATED_IMAGES")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_trailing_bytes_do_no_harm(tmp_path: Path) -> None:
    for name in FORMATS:
        path = write(tmp_path / name, encoded(name))
        expected = np.asarray(read_image(path))
        path.write_bytes(path.read_bytes() + b"trailing" * 100)
        np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:.*metadata")
def test_corrupt_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    for exif in (
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40,
    ):
        path = write(tmp_path / "a.jpg", encoded("jpeg", exif=exif))
        expected = np.asarray(read_image(path))
        np.testing.assert_array_equal(read_image(path, exif=True), expected)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientation_is_ignored(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    path = write(tmp_path / "a.png", encoded("png", exif=exif))
    np.testing.assert_array_equal(read_image(path, exif=True), photo())


# Sizes


def png(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds one row of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, *[0] * 6)


@pytest.mark.parametrize("size", [(10_000, 8_948), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(write(tmp_path / "a.png", png(*size)), r"a\.png: .*[Ii]mage|a\.png: .*pixels")
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 30_000  # KiB; the smallest would take 87,000


@pytest.mark.parametrize(
    "data",
    [gif(65535, 65535), b"P6 60000 60000 255\n" + bytes(99), bmp(30000, 30000)],
    ids=["gif", "ppm", "bmp"],
)
def test_decompression_bomb_of_another_format(tmp_path: Path, data: bytes) -> None:
    refused(write(tmp_path / "a.jpg", data), "pixels")


def test_just_below_the_limit_only_the_pixels_are_missing(tmp_path: Path) -> None:
    assert 10_000 * 8_947 <= MAX_PIXELS < 10_000 * 8_948
    refused(write(tmp_path / "a.png", png(10_000, 8_947)), "truncated|broken")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limit_does_not_follow_pillow_upwards_but_downwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.png", png(10_000, 8_948))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(path, r"10000 x 8948 pixels are more than the 89,478,485 allowed")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # photo() has 2240, of which Pillow would only warn
    refused(write(tmp_path / "b.png", encoded("png")), r"56 x 40 pixels are more than the 2,000 allowed")


def test_large_array_and_image() -> None:
    huge = np.broadcast_to(np.uint8(0), (10_000, 10_000))
    with pytest.raises(ImageError, match="10000 x 10000 pixels"):
        read_image(huge)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels_in_a_file(tmp_path: Path, size: tuple[int, int]) -> None:
    refused(write(tmp_path / "a.png", png(*size)), "not an image, or damaged")


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0), (0, 0, 1)])
def test_no_pixels_in_an_array(shape: tuple[int, ...]) -> None:
    refused(np.zeros(shape, np.uint8), "ndarray: the image has no pixels")


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((1, 4, 4, 3), np.uint8), np.uint8([1])],
)
def test_array_of_another_kind(array: np.ndarray) -> None:
    refused(array, r"expected a uint8 array \[H, W\].* got " + str(array.dtype))


# Fuzz


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few flips, a cut, an insertion, a removal, or a repeated piece; often in the header."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(min(len(data), rng.choice([64, 64, 10**9])) or 1)
        kind = rng.randrange(6)
        if kind <= 1 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[place : place + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"])
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            del data[place : place + rng.randrange(1, 9)]
    return bytes(data)


def fuzz_seeds(name: str) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    extra = {
        "jpeg": [{"progressive": True, "exif": exif}],
        "png": [{"exif": exif}],
        "gif": [{"save_all": True, "append_images": [photo().rotate(90)]}],
        "webp": [{"exif": exif, "lossless": True}],
        "tiff": [{"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"exif": exif}],
    }
    return [encoded(name), *(encoded(name, **options) for options in extra.get(name, []))]


@pytest.mark.parametrize("name", FORMATS)
def test_fuzz(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Nothing but `ImageError` escapes, and nothing hangs."""
    rng, seeds, path = random.Random(name), fuzz_seeds(name), tmp_path / "a.jpg"
    rounds, read = int(os.environ.get("DPN_JAX_FUZZ", "200")), 0
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd files that it reads all the same
        for _ in range(rounds):
            write(path, mutated(rng.choice(seeds), rng))
            try:
                read_image(path)
            except ImageError as error:
                assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            else:
                read += 1
                assert SMALL(path).shape == (32, 32, 3)
    assert 0 < read < rounds  # else the mutations test only one of the two
    output = capfd.readouterr()
    assert output.out == "" and (output.err == "" or name == "tiff")  # libtiff, in C, prints what it finds
