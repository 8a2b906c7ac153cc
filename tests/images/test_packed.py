"""Packed images read back: what comes, in which order, and what is said of a damaged folder."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dpn_jax.errors import DataError, ImageError
from dpn_jax.images.packed import PackedImages, is_packed
from dpn_jax.images.read import read_image
from dpn_jax.images.records import MANIFEST, Record
from dpn_jax.images.splits import image_folder, list_images
from dpn_jax.images.transform import Transform
from tests.support.packs import CROPS, packed, write_classes

pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of seven images; do not change them."""
    return write_classes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their files, packed in six shards; do not change it."""
    return packed(photos, tmp_path_factory.mktemp("packed") / "whole").folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "packed"))


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def test_photos_come_back_as_their_files(photos: Path, whole: Path) -> None:
    images, folder = PackedImages(whole), image_folder(photos, split="all")
    assert images.class_names == folder.class_names and images.labels == folder.labels and len(images) == 21
    assert images.preprocessing is None and not images.broken
    for index, file in enumerate(folder.files):
        content, label = images[index]
        assert content == Path(file).read_bytes() and label == folder.labels[index]
        assert images.files[index] == file.replace(str(photos), str(whole))
        assert images.image(images.files[index]) == content
    assert images[-1] == images[20]
    assert images.__getitems__([20, 0, 7]) == [images[20], images[0], images[7]]
    with pytest.raises(IndexError):
        images[21]
    assert len(list(images)) == 21, "it is a sequence, which ends"


def test_crops_come_back_as_the_transform_makes_them(photos: Path, tmp_path: Path) -> None:
    images = packed(photos, tmp_path / "crops", crops=CROPS)
    assert images.preprocessing == CROPS
    for (pixels, label), file, expected in zip(images, *(_columns(photos)), strict=True):
        np.testing.assert_array_equal(pixels, Transform(CROPS).crop(file))
        assert label == expected and pixels.dtype == np.uint8


def _columns(photos: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    folder = image_folder(photos, split="all")
    return folder.files, folder.labels


def test_another_process_reads_what_it_is_sent(whole: Path) -> None:
    images = PackedImages(whole)
    first = images[3]
    again = pickle.loads(pickle.dumps(images))
    assert again[3] == first and again.image(images.files[3]) == first[0]
    content = pickle.loads(pickle.dumps(first[0]))
    assert content == first[0] and content.name == first[0].name


def test_the_same_images_are_held_out_as_of_the_folder(photos: Path, whole: Path) -> None:
    for split in ("train", "val", "all"):
        before, after = image_folder(photos, split=split), image_folder(whole, split=split)
        assert after.files == tuple(file.replace(str(photos), str(whole)) for file in before.files)
        assert after.labels == before.labels and after.identity == before.identity
        assert [bytes(after[index][0]) for index in range(len(after))] == [
            Path(file).read_bytes() for file in before.files
        ]


def test_train_and_val_may_be_packed(photos: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "data" / "train")
    shutil.copytree(photos, tmp_path / "data" / "val")
    train, val = (image_folder(tmp_path / "data", split=split) for split in ("train", "val"))
    assert train.packed is not None and val.packed is None
    assert train.identity == val.identity


def test_a_csv_file_lists_images(photos: Path, tmp_path: Path) -> None:
    lines = [f"{photos / 'cat' / '1.png'},10", "photos/2.png,2", 'photos/3.png,"2"']
    table = tmp_path / "table.csv"
    table.write_text("image,label\n" + "\n".join(lines), "utf-8-sig")
    images = list_images(table)
    assert images.class_names == ("2", "10") and images.labels == (1, 0, 0)
    assert images.files == (str(photos / "cat" / "1.png"), *(str(tmp_path / "photos" / f"{n}.png") for n in (2, 3)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\na.png,x\n", r"no column image in its first line; expected image,label"),
        (b"image,label\na.png,x\nb.png\n", r"line 3: an image and a label expected"),
        (b"image,label\n,x\n", r"line 2: an image and a label expected"),
        (b"image,label\n", "no images"),
        (b"", "no column image, label"),
        (b"image,label\na.png,x,y\n", "line 2: more columns than the first line has; a comma in a name needs quotes"),
        (b"image;label\na.png;x\n", "line 1: columns separated by ';', expected commas"),
        (b"image,label\na.png,x\n./a.png,x\n", r"line 3: .*a.png again, as in line 2"),
        (
            b"label\timage\nx\ta.png\nx\ny\ta.png\n",
            r"3 problems: line 1: columns separated by '\\t', expected commas; line 3: an image and a label expected; "
            "line 4: .*a.png again, as in line 2, as 'y', not 'x'$",
        ),
        (b"image,label\n\xff.png,x\n", "not a CSV file in UTF-8"),
        (b'image,label\n"a.png,x\n', "not a CSV file in UTF-8"),
    ],
)
def test_a_damaged_csv_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ImageError, match=f"table.csv: {message}") as caught:
        list_images(tmp_path / "table.csv")
    assert str(caught.value).isprintable()


# damage


def test_a_damaged_record_is_named_and_the_others_are_read(folder: Path) -> None:
    shard = folder / "00001-of-00006.array_record"
    content = bytearray(shard.read_bytes())
    content[content.index(b"ant/6.png") + 50] ^= 1
    shard.write_bytes(content)
    images = PackedImages(folder)
    at = [Path(file).relative_to(folder).as_posix() for file in images.files].index("ant/6.png")
    message = rf"packed/00001-of-00006\.array_record: record {at - 4} \(ant/6\.png\): damaged \(.*hash mismatch"
    with pytest.raises(ImageError, match=message) as caught:
        images[at]
    assert str(caught.value).isprintable()
    with pytest.raises(ImageError, match=message):
        images.__getitems__([0, at, 1])
    assert all(images[index] for index in range(21) if index != at)


def test_a_truncated_and_a_missing_shard(folder: Path) -> None:
    shard = folder / "00002-of-00006.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ImageError, match=r"00002.*: record 1 \(bee/2\.png\): the shard is truncated: [\d,]+ of [\d,]+ b"
    ):
        PackedImages(folder)[9]
    shard.unlink()
    with pytest.raises(ImageError, match=r"00002.*: record 1 \(bee/2\.png\): No such file or directory$"):
        PackedImages(folder)[9]
    assert PackedImages(folder)[7] and PackedImages(folder)[12]


def test_shards_of_another_folder_are_noticed(folder: Path) -> None:
    (folder / "00000-of-00006.array_record").replace(folder / "00001-of-00006.array_record")
    with pytest.raises(ImageError, match=r"record 0 \(ant/4\.png\): holds ant/0\.png instead"):
        PackedImages(folder)[4]


def test_what_cannot_be_decoded_is_named_by_its_record(folder: Path) -> None:
    content, _ = PackedImages(folder)[5]
    with pytest.raises(ImageError, match=r"00001-of-00006\.array_record: record 1 \(ant/5\.png\): .*truncated"):
        read_image(type(content)(content[:200], content.name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": 2},
            r"manifest\.json: format 2, but this dpn_jax reads format 1; pack the images again, or install",
        ),
        ({"shards": [{"file": "x"}]}, r"manifest\.json: damaged \('images'\); run the same dpn-jax pack again"),
        ({"shards": []}, r"manifest\.json: damaged \(no shards\)"),
        (
            {"shards": [{"file": "../x.array_record", "size": 1, "images": [[0, ["a.png"]]]}]},
            r"manifest\.json: damaged \('\.\./x\.array_record' is not the name of a shard\)",
        ),
        ({"class_names": ["one"]}, r"manifest\.json: damaged \(a class that is not one of 1\)"),
        ({"preprocessing": {"image_size": 3}}, r"manifest\.json: damaged \(image_size must be"),
        ({"preprocessing": {"size": 3}}, r"manifest\.json: damaged"),
    ],
)
def test_a_manifest_of_another_version_or_damaged(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ImageError, match=message) as caught:
        PackedImages(folder)
    assert str(caught.value).isprintable()


def test_a_manifest_that_is_no_json_or_not_there(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ImageError, match=r"manifest\.json: damaged .*; run the same dpn-jax pack again"):
        PackedImages(folder)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(ImageError, match=r"manifest\.json: damaged"):
        PackedImages(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ImageError, match=r"packed: no packed images \(no manifest\.json in it\)"):
        PackedImages(folder)
    (folder / ".packing.json").touch()
    assert is_packed(folder)
    with pytest.raises(DataError, match="packed: has not been packed to its end; run the same dpn-jax pack again"):
        image_folder(folder, split="all")


def test_a_class_folder_may_have_a_manifest_of_its_own(photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / MANIFEST).write_text("{}")
    assert not is_packed(folder) and len(list_images(folder)) == 21


@pytest.mark.parametrize(
    "content", [b"", b"DPN\x02" + bytes(60), bytes(60), Record(0, "a", 5, b"12345").to_bytes()[:-1]]
)
def test_what_is_no_record(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a record of format 1|a record that is not whole"):
        Record.from_bytes(content)


def test_without_array_record_the_extra_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ImageError, match=r'packed images need array_record .*: pip install "dpn-jax\[finetune\]"$'):
        PackedImages(whole)
