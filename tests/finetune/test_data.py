"""Class folders, splits, batches: what is read, in which order, by whom, and what happens when it cannot be."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpn_jax.errors import ImageError
from dpn_jax.finetune import (
    BatchIterator,
    DataError,
    FinetuneConfig,
    ImageFolder,
    batches,
    find_broken,
    image_folder,
)
from dpn_jax.images.read import read_image
from dpn_jax.images.transform import Transform
from dpn_jax.images.workers import prefetched
from dpn_jax.pretrained import Preprocessing

SMALL = Preprocessing(image_size=32)
PLAIN = FinetuneConfig(batch_size=4, workers=0, crop_scale=(1, 1), flip=0.0)
AUGMENTED = FinetuneConfig(batch_size=4, workers=0, randaugment=9, color_jitter=0.4)


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 255, (count, 6, 8, 3), np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).resize((48, 36)).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 10, 7 and 5 images; do not change them."""
    path = tmp_path_factory.mktemp("images")
    for seed, (name, count) in enumerate({"cat": 10, "dog": 7, "fish": 5}.items()):
        write_images(path / name, count, seed)
    return path


@pytest.fixture
def changing(root: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(root, tmp_path / "images"))


@pytest.fixture
def everything(root: Path) -> ImageFolder:
    return image_folder(root, split="all")


def names(folder: ImageFolder) -> list[str]:
    return [f"{Path(file).parent.name}/{Path(file).name}" for file in folder.files]


def digests(found: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """One for each batch."""
    return [hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest() for batch in found]


def take(iterator: BatchIterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


# folders and splits


def test_all_lists_every_image_with_its_class(everything: ImageFolder) -> None:
    assert everything.class_names == ("cat", "dog", "fish")
    assert everything.labels == (0,) * 10 + (1,) * 7 + (2,) * 5
    assert len(everything) == 22 and all(Path(file).is_absolute() for file in everything.files)
    assert all(
        Path(file).parent.name == everything.class_names[label]
        for file, label in zip(everything.files, everything.labels, strict=True)
    )


def test_the_split_takes_its_share_of_each_class(root: Path, everything: ImageFolder) -> None:
    train, val = (image_folder(root, split=split, val_fraction=0.3) for split in ("train", "val"))
    assert sorted(train.files + val.files) == sorted(everything.files)
    assert [val.labels.count(label) for label in range(3)] == [3, 2, 2]
    assert train.class_names == val.class_names == everything.class_names


def test_the_split_follows_from_seed_and_names(root: Path, changing: Path) -> None:
    val = names(image_folder(root, split="val", val_fraction=0.3))
    assert val == names(image_folder(changing, split="val", val_fraction=0.3)), "not from where the folder lies"
    assert val != names(image_folder(root, split="val", val_fraction=0.3, seed=1))
    (changing / "cat" / "0.png").rename(changing / "cat" / "new.png")
    moved = set(val) ^ set(names(image_folder(changing, split="val", val_fraction=0.3)))
    assert len(moved) <= 2, "another file name moves itself and at most one other"


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.99, 4)])
def test_both_splits_have_every_class(root: Path, fraction: float, count: int) -> None:
    val = image_folder(root, split="val", val_fraction=fraction)
    assert val.labels.count(2) == count
    assert set(image_folder(root, split="train", val_fraction=fraction).labels) == {0, 1, 2}


def test_train_and_val_folders_are_taken_as_they_are(root: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        for label in ("b", "a"):
            write_images(tmp_path / name / label, 2 if name == "train" else 1)
    assert names(image_folder(tmp_path, split="train")) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert len(image_folder(tmp_path, split="val")) == 2
    with pytest.raises(DataError, match=r"has train/ and val/; name one"):
        image_folder(tmp_path, split="all")
    assert len(image_folder(tmp_path / "val", split="all")) == 2


def test_a_class_may_be_called_train(changing: Path) -> None:
    (changing / "cat").rename(changing / "train")
    assert image_folder(changing, split="train").class_names == ("dog", "fish", "train")


def test_classes_are_in_natural_order_as_timms(tmp_path: Path) -> None:
    for name in ("10", "2", "b", "A"):
        write_images(tmp_path / name, 1)
    assert image_folder(tmp_path, split="all").class_names == ("2", "10", "A", "b")


def test_hidden_folders_and_loose_files_are_passed_over(changing: Path) -> None:
    (changing / ".ipynb_checkpoints").mkdir()
    (changing / "README.txt").write_text("no image")
    (changing / "cat" / "notes.txt").write_text("no image")
    assert len(image_folder(changing, split="all")) == 22


def test_links_newlines_and_bytes_that_are_no_text(changing: Path, tmp_path: Path) -> None:
    (changing / "cat").rename(changing / os.fsdecode(b"caf\xe9"))
    (changing / "dog" / "0.png").rename(changing / "dog" / os.fsdecode(b"line\nbreak \xff.png"))
    (changing / "fish").rename(tmp_path / "elsewhere")
    (changing / "fish").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(changing)
    folder = image_folder(tmp_path / "link", split="all")
    assert folder.class_names == ("caf\\xe9", "dog", "fish")
    assert len(folder) == 22
    json.dumps(folder.class_names).encode("utf-8")
    config = dataclasses.replace(PLAIN, batch_size=22)
    with batches(folder, config, SMALL, train=False) as iterator:
        batch = next(iterator)
        json.dumps(iterator.get_state())
    np.testing.assert_array_equal(batch["label"], folder.labels)
    assert find_broken(folder, PLAIN, SMALL) == {}
    Path(folder.files[10]).write_bytes(b"broken")
    with pytest.raises(DataError) as error, batches(folder, config, SMALL, train=False) as iterator:
        next(iterator)
    assert str(error.value).isprintable()


def test_folder_errors(changing: Path, tmp_path: Path) -> None:
    def refused(path: Path, message: str, **options: Any) -> None:
        for split in ("train", "val"):
            with pytest.raises(DataError, match=message) as error:
                image_folder(path, split=split, **options)
            assert str(error.value).isprintable() and str(path) in str(error.value)

    refused(tmp_path / "none", "no such folder")
    refused(changing / "cat" / "0.png", "is not a folder")
    refused(changing / "cat", "no class folders; expected")
    (changing / "cow").mkdir()
    refused(changing, r"cow: the class has no images")
    with pytest.raises(DataError, match=r"cow: the class has no images"):
        image_folder(changing, split="all")
    (changing / "cow" / "1.png").write_bytes(b"")
    refused(changing, r"cow: one image is too few to split")
    shutil.rmtree(changing / "cow")
    shutil.rmtree(changing / "dog")
    shutil.rmtree(changing / "fish")
    refused(changing, r"one class only, cat")
    with pytest.raises(DataError, match=r"val_fraction 0 leaves no images"):
        write_images(changing / "dog", 2)
        image_folder(changing, split="val", val_fraction=0)
    assert len(image_folder(changing, split="train", val_fraction=0)) == 12
    for name in ("train/cat", "train/dog"):
        write_images(changing / name, 2)
    refused(changing, r"has train/ but no val/")
    write_images(changing / "val" / "cat", 2)
    write_images(changing / "val" / "dogs", 2)
    refused(changing, r"must have the same class folders, but 2 are in one only, such as .*train/dog$")


def test_argument_errors(root: Path, everything: ImageFolder) -> None:
    with pytest.raises(ValueError, match="split must be"):
        image_folder(root, split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\)"):
        image_folder(root, split="val", val_fraction=1.0)
    with pytest.raises(DataError, match="batch_size 23 is larger than the 22 training images"):
        batches(everything, dataclasses.replace(PLAIN, batch_size=23), SMALL, train=True)
    with pytest.raises(ValueError, match="process_index must be in"):
        batches(everything, PLAIN, SMALL, train=True, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        batches(everything, PLAIN, SMALL, train=True, process_count=3)
    four = Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(ValueError, match="3 channels"):
        batches(everything, PLAIN, four, train=True)


@pytest.mark.parametrize("train", [False, True])
def test_images_that_are_not_square_are_refused(train: bool, everything: ImageFolder) -> None:
    wide = Preprocessing(image_size=(32, 48))
    with pytest.raises(DataError, match=r"square, but those of the weights are 32 x 48 pixels; pass --image-size$"):
        batches(everything, PLAIN, wide, train=train)
    with batches(everything, dataclasses.replace(PLAIN, image_size=32), wide, train=train) as squares:
        assert next(squares)["image"].shape == (4, 32, 32, 3)


def test_without_refuses_to_lose_a_class(everything: ImageFolder) -> None:
    kept = everything.without(everything.files[:3])
    assert kept.files == everything.files[3:] and kept.labels == everything.labels[3:]
    with pytest.raises(DataError, match="class 'dog': none of its images"):
        everything.without(everything.files[10:17])


# batches


def test_validation_is_in_order_once_and_timms_crop(everything: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(AUGMENTED, batch_size=6)
    iterator = batches(everything, config, SMALL, train=False)
    found = list(iterator)
    assert len(found) == iterator.per_epoch == 4
    for batch in found:
        assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
            "image": (np.uint8, (6, 32, 32, 3)),
            "label": (np.int32, (6,)),
            "weight": (np.float32, (6,)),
        }
    images, labels, weights = (np.concatenate([batch[key] for batch in found]) for key in ("image", "label", "weight"))
    crop = Transform(SMALL).crop
    np.testing.assert_array_equal(images[:22], np.stack([crop(file) for file in everything.files]))
    np.testing.assert_array_equal(labels[:22], everything.labels)
    np.testing.assert_array_equal(weights, [1] * 22 + [0] * 2)
    assert not images[22:].any()
    monkeypatch.delattr("dpn_jax.finetune.data.prefetched")  # no worker starts again
    assert next(iterator, None) is None, "an iterator that ended stays at its end"


def test_training_sees_every_image_once_an_epoch_in_another_order(everything: ImageFolder) -> None:
    crop = Transform(SMALL).crop
    number = {crop(file).tobytes(): index for index, file in enumerate(everything.files)}
    config = dataclasses.replace(PLAIN, batch_size=5)
    iterator = batches(everything, config, SMALL, train=True, epochs=3)
    seen = [[number[image.tobytes()] for image in batch["image"]] for batch in iterator]
    assert iterator.per_epoch == 4 and len(seen) == 12, "the incomplete batch of an epoch is dropped"
    epochs = [list(itertools.chain(*seen[start : start + 4])) for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch) for epoch in epochs}) > 1, "not always the same two are dropped"
    again = batches(everything, config, SMALL, train=True, epochs=1)
    assert seen[:4] == [[number[image.tobytes()] for image in batch["image"]] for batch in again]
    other = batches(everything, dataclasses.replace(config, seed=1), SMALL, train=True)
    assert seen[0] != [number[image.tobytes()] for image in next(other)["image"]]


def test_labels_go_with_their_images(everything: ImageFolder) -> None:
    crop = Transform(SMALL).crop
    label = {crop(file).tobytes(): label for file, label in zip(everything.files, everything.labels, strict=True)}
    for batch in batches(everything, PLAIN, SMALL, train=True, epochs=1):
        assert [label[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
        assert batch["weight"].tolist() == [1.0] * 4


def test_training_has_no_end_by_default(everything: ImageFolder) -> None:
    with batches(everything, PLAIN, SMALL, train=True) as iterator:
        assert len(take(iterator, 12)) == 12


def test_augmentation_changes_with_the_epoch_and_the_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 2, seed=0)  # the same two images twice
    folder = image_folder(tmp_path, split="all")
    found = [
        image.tobytes() for batch in batches(folder, AUGMENTED, SMALL, train=True, epochs=5) for image in batch["image"]
    ]
    assert len(set(found)) == 20


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_flips_come_at_their_rate(tmp_path: Path, probability: float) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 10)
    folder = image_folder(tmp_path, split="all")
    plain = {Transform(SMALL).crop(file).tobytes() for file in folder.files}
    config = dataclasses.replace(PLAIN, flip=probability, batch_size=20)
    images = np.concatenate([batch["image"] for batch in batches(folder, config, SMALL, train=True, epochs=20)])
    flipped = np.array([image.tobytes() not in plain for image in images])
    assert abs(flipped.mean() - probability) < 0.06
    assert all(image[:, ::-1].tobytes() in plain for image in images[flipped])


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.3, 0.6)},
        {"randaugment": 9},
        {"color_jitter": 0.4},
        {"randaugment": 9, "randaugment_layers": 5},
    ],
)
def test_every_option_changes_the_images(everything: ImageFolder, change: dict[str, Any]) -> None:
    before = digests(batches(everything, dataclasses.replace(PLAIN, randaugment=0), SMALL, train=True, epochs=1))
    after = digests(batches(everything, dataclasses.replace(PLAIN, **change), SMALL, train=True, epochs=1))
    assert not set(before) & set(after)


def test_the_fill_is_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fills = []
    monkeypatch.setattr(
        "dpn_jax.finetune.data.rand_augment", lambda image, generator, *, fill, **_: fills.append(fill) or image
    )
    for name in ("a", "b"):
        write_images(tmp_path / name, 2)
    folder = image_folder(tmp_path, split="all")
    for mean in ((0.1, 0.5, 1.0), (0.4,)):
        settings = dataclasses.replace(SMALL, mean=mean, std=(0.2,) * len(mean))
        next(batches(folder, AUGMENTED, settings, train=True, epochs=1))
    assert set(fills) == {(26, 128, 255), 102}


def test_one_channel_and_image_size(everything: ImageFolder) -> None:
    gray = Preprocessing(mean=(0.5,), std=(0.2,))
    for train in (True, False):
        for config in (AUGMENTED, PLAIN):
            config = dataclasses.replace(config, image_size=40)
            assert next(batches(everything, config, gray, train=train, epochs=1))["image"].shape == (4, 40, 40, 1)


def test_the_processes_share_the_batch(everything: ImageFolder) -> None:
    for train in (True, False):
        whole = list(batches(everything, AUGMENTED, SMALL, train=train, epochs=2))
        parts = [
            list(batches(everything, AUGMENTED, SMALL, train=train, epochs=2, process_index=index, process_count=2))
            for index in range(2)
        ]
        for batch, *slices in zip(whole, *parts, strict=True):
            for key, value in batch.items():
                assert slices[0][key].shape[0] == 2
                np.testing.assert_array_equal(value, np.concatenate([part[key] for part in slices]))


def test_a_resumed_iterator_sees_what_the_other_would_have_seen(everything: ImageFolder) -> None:
    first = batches(everything, AUGMENTED, SMALL, train=True, epochs=3)
    take(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    remaining = digests(first)
    second = batches(everything, AUGMENTED, SMALL, train=True, epochs=3)
    take(second, 2)
    second.set_state(state)
    assert digests(second) == remaining and len(remaining) == 8
    second.set_state(state)
    assert digests(second) == remaining, "an iterator that ended can be set back"
    assert second.get_state()["next_index"] == 15


def test_a_state_over_other_data_is_refused(everything: ImageFolder, changing: Path) -> None:
    state = batches(everything, PLAIN, SMALL, train=True).get_state()
    moved = image_folder(changing, split="all")
    batches(moved, PLAIN, SMALL, train=True).set_state(state)
    batches(moved, dataclasses.replace(PLAIN, workers=3, epochs=99), SMALL, train=True).set_state(state)
    for folder, config in (
        (moved.without(moved.files[:1]), PLAIN),
        (moved, dataclasses.replace(PLAIN, batch_size=5)),
        (moved, dataclasses.replace(PLAIN, seed=5)),
        (dataclasses.replace(moved, labels=moved.labels[::-1]), PLAIN),
    ):
        with pytest.raises(DataError, match="not those of the saved run"):
            batches(folder, config, SMALL, train=True).set_state(state)


# broken images


def test_a_broken_image_stops_with_its_name(changing: Path) -> None:
    (changing / "dog" / "3.png").write_bytes(b"broken")
    folder = image_folder(changing, split="all")
    for train in (True, False):
        with pytest.raises(DataError, match=r"dog/3\.png: not an image.*--skip-broken") as error:
            list(batches(folder, AUGMENTED, SMALL, train=train, epochs=1))
        assert str(error.value).isprintable()


@pytest.mark.parametrize("known", [True, False])
def test_without_a_broken_image_nothing_else_moves(
    changing: Path, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In training the next one takes its place, in validation nothing does; whether it is known or found on the way."""
    config = dataclasses.replace(PLAIN, batch_size=22, skip_broken=not known)
    whole = image_folder(changing, split="all")
    before = [next(batches(whole, config, SMALL, train=train)) for train in (True, False)]
    broken = [str(changing / "dog" / name) for name in ("3.png", "4.png")]
    for file in broken:
        Path(file).write_bytes(b"broken")
    at = [whole.files.index(file) for file in broken]
    folder = dataclasses.replace(whole, skipped=frozenset(at)) if known else whole
    after = [next(batches(folder, config, SMALL, train=train)) for train in (True, False)]
    following = whole.files.index(str(changing / "dog" / "5.png"))
    order = np.random.default_rng([config.seed, 0, 0]).permutation(22)
    rows = {"train": [int(np.flatnonzero(order == index)[0]) for index in at], "val": at}
    row = int(np.flatnonzero(order == following)[0])
    for old, new, split in zip(before, after, ("train", "val"), strict=True):
        others = np.delete(np.arange(22), rows[split])
        for key in ("image", "label", "weight"):
            assert np.array_equal(old[key][others], new[key][others]), key
    for place in rows["train"]:
        assert np.array_equal(after[0]["image"][place], before[0]["image"][row])
        assert after[0]["weight"][place] == 1
    assert not after[1]["weight"][rows["val"]].any() and after[1]["weight"].sum() == 20
    assert ("dog/3.png: not an image" in caplog.text) != known


def test_none_of_the_images_can_be_read(changing: Path) -> None:
    for file in changing.rglob("*.png"):
        file.write_bytes(b"broken")
    config = dataclasses.replace(PLAIN, skip_broken=True)
    with pytest.raises(DataError, match="none of the 22 images can be read"):
        next(batches(image_folder(changing, split="all"), config, SMALL, train=True))


def test_broken_images_are_found_and_removed(changing: Path) -> None:
    whole = (changing / "cat" / "1.png").read_bytes()
    (changing / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (changing / "fish" / "4.png").write_bytes(b"")
    (changing / "dog" / "gone.png").symlink_to(changing / "nowhere.png")
    Image.new("L", (1, 5000)).save(changing / "dog" / "narrow.png")
    folder = image_folder(changing, split="all")
    broken = find_broken(folder, PLAIN, Preprocessing(image_size=224))
    assert sorted(Path(file).name for file in broken) == ["1.png", "4.png", "gone.png", "narrow.png"]
    assert all(file in reason for file, reason in broken.items())
    healthy = folder.without(broken)
    assert len(healthy) == len(folder) - 4 == 20
    config = dataclasses.replace(AUGMENTED, batch_size=20)
    assert next(batches(healthy, config, SMALL, train=True))["weight"].sum() == 20


def test_no_broken_image_escapes_the_check(changing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpn_jax.finetune.checks._FILES_PER_CHECK", 4)
    for name in ("cat/0.png", "dog/5.png", "fish/4.png"):
        (changing / name).write_bytes(b"broken")
    broken = find_broken(image_folder(changing, split="all"), PLAIN, SMALL)
    assert [str(Path(file).relative_to(changing)) for file in broken] == ["cat/0.png", "dog/5.png", "fish/4.png"]


def test_jpegs_are_decoded_at_a_reduced_size(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 900 * 1200).reshape(900, 1200).astype(np.uint8)
    file = tmp_path / "photo.jpg"
    Image.fromarray(gradient).convert("RGB").save(file, quality=95)
    sizes = {at_least: read_image(file, at_least=at_least).size for at_least in (None, 901, 451, 450, 226, 225, 100)}
    assert sizes == {
        None: (1200, 900), 901: (1200, 900), 451: (1200, 900), 450: (600, 450), 226: (600, 450), 225: (300, 225),
        100: (150, 113),
    }  # fmt: skip
    small, whole = read_image(file, at_least=225), read_image(file).resize((300, 225), Image.Resampling.BOX)
    assert abs(np.asarray(small).astype(int) - np.asarray(whole)).max() <= 4
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ImageError, match=r"photo\.jpg"):
        read_image(file, at_least=100)


def test_no_training_crop_is_enlarged_by_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (800, 440)).save(tmp_path / name / "1.jpg")
    crops = []

    def watched(image: Image.Image, size: int, generator: np.random.Generator, **options: Any) -> Image.Image:
        crops.append((image.size, size))
        return image.resize((size, size))

    monkeypatch.setattr("dpn_jax.finetune.data.random_crop", watched)
    config = dataclasses.replace(PLAIN, batch_size=2, crop_scale=(0.25, 1.0), crop_ratio=(0.64, 1.0))
    next(batches(image_folder(tmp_path, split="all"), config, Preprocessing(image_size=50), train=True, epochs=1))
    # a quarter of the area at 0.64 is 0.4 of the shorter side: 50 / 0.4 = 125 pixels are needed, a quarter is 110
    assert set(crops) == {((400, 220), 50)}


# worker processes


class Probe:
    """Says what a worker process is."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, bool, str]:
        import jax

        return os.getpid(), jax._src.xla_bridge.backends_are_initialized(), jax.config.jax_platforms


def workers() -> list[multiprocessing.Process]:
    return [child for child in multiprocessing.active_children() if child.name.startswith("grain")]


@pytest.mark.slow
def test_workers_change_nothing_and_end_when_told(everything: ImageFolder) -> None:
    expected = digests(batches(everything, AUGMENTED, SMALL, train=True, epochs=3))
    config = dataclasses.replace(AUGMENTED, workers=2)
    with batches(everything, config, SMALL, train=True, epochs=3) as iterator:
        assert digests(take(iterator, 7)) == expected[:7]
        state = iterator.get_state()
        assert len(workers()) == 2
        assert digests(iterator) == expected[7:]
    assert not workers()
    resumed = batches(everything, dataclasses.replace(AUGMENTED, workers=1), SMALL, train=True, epochs=3)
    with resumed:
        resumed.set_state(state)
        batch = next(resumed)
        assert digests([batch]) == expected[7:8]
        assert all(type(value) is np.ndarray for value in batch.values())
    assert not workers()


@pytest.mark.slow
def test_another_process_goes_on_with_the_same_images(everything: ImageFolder, root: Path) -> None:
    iterator = batches(everything, AUGMENTED, SMALL, train=True, epochs=2)
    take(iterator, 3)
    script = """
import json, sys
from dpn_jax.finetune import batches, image_folder
from tests.finetune.test_data import AUGMENTED, SMALL, digests
iterator = batches(image_folder(sys.argv[1], split="all"), AUGMENTED, SMALL, train=True, epochs=2)
iterator.set_state(json.loads(sys.argv[2]))
print(json.dumps(digests(iterator)))
"""
    command = [sys.executable, "-c", script, str(root), json.dumps(iterator.get_state())]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout) == digests(iterator)


@pytest.mark.slow
def test_a_worker_holds_no_device_and_names_broken_images(changing: Path) -> None:
    with contextlib.closing(prefetched(Probe(), 1)) as found:
        pid, initialized, platforms = next(found)
    assert pid != os.getpid() and not initialized and platforms == "cpu"
    (changing / "dog" / "3.png").write_bytes(b"broken")
    folder, config = image_folder(changing, split="all"), dataclasses.replace(AUGMENTED, workers=2)
    with pytest.raises(DataError, match=r"dog/3\.png: not an image.*--skip-broken"):
        list(batches(folder, config, SMALL, train=True, epochs=1))
    assert [Path(file).name for file in find_broken(folder, config, SMALL)] == ["3.png"]
    assert not workers()


@pytest.mark.slow
def test_a_worker_outlives_signals_to_all_and_its_death_is_an_error(everything: ImageFolder) -> None:
    config = dataclasses.replace(AUGMENTED, workers=2)
    with batches(everything, config, SMALL, train=True) as iterator:
        take(iterator, 2)
        running = workers()
        for worker in running:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        take(iterator, 12)  # more than was read ahead
        assert workers() == running
        running[1].kill()
        start = time.monotonic()
        with pytest.raises(DataError, match=r"worker process that reads images died \(exit code -9\): killed"):
            take(iterator, 50)
        assert time.monotonic() - start < 60
        assert not workers()
        state = iterator.get_state()["next_index"]
        expected = batches(everything, AUGMENTED, SMALL, train=True)
        assert digests([next(iterator)]) == digests(take(expected, state + 1))[-1:], "it can go on where it stood"


def test_balanced_sampling_shows_each_class_as_often(everything: ImageFolder) -> None:
    config = dataclasses.replace(AUGMENTED, sampling="balanced", batch_size=11)
    epochs = 30
    with batches(everything, config, SMALL, train=True, epochs=epochs) as iterator:
        seen = list(iterator)
    labels = np.concatenate([batch["label"] for batch in seen])
    assert len(labels) == epochs * 22
    np.testing.assert_allclose(np.bincount(labels) / len(labels), 1 / 3, atol=0.06)  # shuffled: 0.45, 0.32, 0.23
    pictures = np.concatenate([batch["image"] for batch in seen[:2]])
    assert len({picture.tobytes() for picture in pictures}) == 22, "an image drawn twice is augmented in two ways"
    with batches(everything, config, SMALL, train=True, epochs=epochs) as iterator:
        assert digests(take(iterator, 3)) == digests(seen[:3])
    with batches(everything, config, SMALL, train=False) as iterator:
        validated = np.concatenate([batch["label"] for batch in iterator])
    assert np.bincount(validated).tolist() == [10, 7, 5], "validation takes each image once"
    with pytest.raises(ValueError, match="sampling='balanced' needs to know every label"):
        batches(list(zip(everything.files, everything.labels, strict=True)), config, SMALL, train=True)


SCRIPT = """
import sys, time
from dpn_jax.pretrained import Preprocessing
from dpn_jax.finetune import FinetuneConfig, batches, image_folder

def main():
    global iterator
    folder = image_folder(sys.argv[1], split="all")
    iterator = batches(folder, FinetuneConfig(batch_size=4), Preprocessing(image_size=32), train=True)
    next(iterator)
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))

"""


@pytest.mark.slow
def test_workers_end_with_a_killed_run_and_quietly_with_a_finished_one(root: Path, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "if __name__ == '__main__':\n    main()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(script), str(root)]
    result = subprocess.run([*command, "0"], capture_output=True, text=True, timeout=120, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ready\n", "")
    run = subprocess.Popen([*command, "300"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert run.stdout is not None and run.stdout.readline() == b"ready\n"
    children = [child for child in psutil.Process(run.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(children) == 2
    run.kill()
    run.wait()
    run.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.slow
def test_a_script_without_a_main_guard_gets_a_clear_error(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    many = "[*zip(folder.files, folder.labels)] * 10_000"  # more than a pipe holds: its writer would wait forever
    script.write_text(SCRIPT.replace("folder, Finetune", f"{many}, Finetune") + "main()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(root), "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 1 and result.stdout == ""
    assert "the script runs again in a worker process: put its code under: if __name__ == '__main__'" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("must keep its code under: if __name__ == '__main__'")
