"""Batches of images that are not files: packed ones, a Hugging Face set, a list."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dpn_jax.finetune import (
    DataError,
    FinetuneConfig,
    RunError,
    batches,
    find_broken,
    finetune,
    image_folder,
)
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.read import read_image
from dpn_jax.images.sources import LabeledImages
from dpn_jax.pretrained import Preprocessing
from tests.support.finetune_runs import contents, write_weights
from tests.support.packs import CROPS, packed, write_classes

PLAIN = FinetuneConfig(batch_size=4, workers=0, crop_scale=(1, 1), flip=0.0)
AUGMENTED = FinetuneConfig(batch_size=4, workers=0, randaugment=9, color_jitter=0.4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of seven images; do not change them."""
    return write_classes(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def datasets() -> ModuleType:
    """Hugging Face's library."""
    return pytest.importorskip("datasets")


def digests(found: Iterable[dict[str, np.ndarray]]) -> list[str]:
    return [hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest() for batch in found]


def hugging_face(datasets: ModuleType, photos: Path) -> LabeledImages:
    """A set with the images in its Arrow table."""
    folder = image_folder(photos, split="all")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=folder.class_names)})
    columns = {"image": [{"bytes": Path(file).read_bytes()} for file in folder.files], "label": list(folder.labels)}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("config", [PLAIN, AUGMENTED], ids=["plain", "augmented"])
@pytest.mark.parametrize("train", [True, False])
def test_the_same_images_give_the_same_batches(
    photos: Path, tmp_path: Path, config: FinetuneConfig, train: bool
) -> None:
    folder = image_folder(photos, split="all")
    with batches(folder, config, CROPS, train=train, epochs=2) as iterator:
        state, expected = iterator.get_state(), digests(iterator)
    files = packed(photos, tmp_path / "files")
    sources = {
        "list": [(Path(file), np.int64(label)) for file, label in zip(folder.files, folder.labels, strict=True)],
        "mappings": [{"image": read_image(file), "label": label} for file, label in folder],
        "packed": files,
        "folder of packed": image_folder(files.folder, split="all"),
    }
    for name, source in sources.items():
        with batches(source, config, CROPS, train=train, epochs=2) as iterator:
            assert digests(iterator) == expected, name
            if "packed" in name:
                iterator.set_state(state)
            else:
                with pytest.raises(DataError, match="not those of the saved run"):
                    iterator.set_state(state)


@pytest.mark.parametrize("train", [True, False])
def test_a_hugging_face_set(datasets: ModuleType, photos: Path, train: bool) -> None:
    folder, source = image_folder(photos, split="all"), hugging_face(datasets, photos)
    assert sorted(source[0]) == ["image", "label"]
    for config in (PLAIN, AUGMENTED):
        expected = digests(batches(folder, config, CROPS, train=train, epochs=1))
        assert digests(batches(source, config, CROPS, train=train, epochs=1)) == expected


@pytest.mark.slow
def test_worker_processes_read_them_too(datasets: ModuleType, photos: Path, tmp_path: Path) -> None:
    expected = digests(batches(image_folder(photos, split="all"), AUGMENTED, CROPS, train=True, epochs=2))
    for source in (hugging_face(datasets, photos), packed(photos, tmp_path / "files")):
        config = dataclasses.replace(AUGMENTED, workers=2)
        with batches(source, config, CROPS, train=True, epochs=2) as iterator:
            assert digests(iterator) == expected


def test_packed_crops_are_used_as_they_are_where_they_fit(photos: Path, tmp_path: Path) -> None:
    folder, crops = image_folder(photos, split="all"), packed(photos, tmp_path / "crops", crops=CROPS)
    same = dataclasses.replace(CROPS, mean=(0.1,) * 3)
    for source in (crops, image_folder(crops.folder, split="all")):
        for train in (True, False):
            assert digests(batches(source, PLAIN, same, train=train, epochs=1)) == digests(
                batches(folder, PLAIN, CROPS, train=train, epochs=1)
            )
    images = [(image, label) for image, label in crops]
    expected = digests(batches(images, AUGMENTED, CROPS, train=True, epochs=1))
    assert digests(batches(crops, AUGMENTED, CROPS, train=True, epochs=1)) == expected, "augmented as photos"
    assert next(batches(crops, AUGMENTED, Preprocessing(image_size=40), train=True))["image"].shape == (4, 40, 40, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "have image_size 32, but image_size 40 is needed; pack the photos again"),
        ({"crop_fraction": 0.9}, "have crop_fraction 0.875, but crop_fraction 0.9 is"),
        ({"crop_mode": "squash", "interpolation": "box"}, "have interpolation bicubic, crop_mode center, but inter"),
        ({"mean": (0.5,), "std": (0.5,)}, "have channels 3, but channels 1 is"),
        ({"crop_mode": "border"}, "have crop_mode center, border color None, but"),
    ],
)
def test_crops_of_another_geometry_are_refused(
    photos: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    crops = packed(photos, tmp_path / "crops", crops=CROPS)
    other = dataclasses.replace(CROPS, **change)
    for config, train in ((PLAIN, True), (PLAIN, False), (AUGMENTED, False)):
        with pytest.raises(DataError, match=f"crops: its crops {message}") as caught:
            batches(crops, config, other, train=train)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("gone.png", 1), r"gone\.png: No such file"),
        ((b"no image", 1), "item 2: not an image, or damaged"),
        ((np.zeros((3, 3)), 1), r"item 2: expected a uint8 array .*, got float64 \[3, 3\]"),
        (([1, 2], 1), "item 2: "),
        ((None, 1), "item 2: "),
        ("photo.jpg", "item 2: expected an image and its label, got str"),
        ({"image": "photo.jpg"}, "item 2: expected an image and its label, got dict"),
        (("photo.jpg", 1, 2), "item 2: expected an image and its label, got tuple"),
        (("photo.jpg", None), "item 2: its label must be the index of a class, from 0"),
        (("photo.jpg", -1), "item 2: its label"),
        (("photo.jpg", 1.0), "item 2: its label"),
        (("photo.jpg", "cat"), "item 2: its label"),
    ],
)
def test_an_item_that_is_no_image_is_named(item: object, message: str) -> None:
    good = np.full((40, 40, 3), 7, np.uint8)
    source = [(good, 0), (good, 1), item, (good, 0)]
    for train in (True, False):
        with pytest.raises(DataError, match=message) as caught:
            list(batches(source, PLAIN, CROPS, train=train, epochs=1))
        assert str(caught.value).isprintable()
        skipping = dataclasses.replace(PLAIN, skip_broken=True)
        (batch,) = batches(source, skipping, CROPS, train=train, epochs=1)
        assert batch["weight"].sum() == (4 if train else 3)


def test_a_source_of_no_images_at_all() -> None:
    config = dataclasses.replace(PLAIN, skip_broken=True)
    with pytest.raises(DataError, match="none of the 5 images can be read: item "):
        next(batches(["photo.jpg"] * 5, config, CROPS, train=True))


def test_a_hugging_face_image_that_cannot_be_decoded(datasets: ModuleType, photos: Path) -> None:
    content = (photos / "ant" / "0.png").read_bytes()
    columns = {"image": [{"bytes": content}, {"bytes": content[:300]}], "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    source = datasets.Dataset.from_dict(columns, features=features)
    config = dataclasses.replace(PLAIN, batch_size=2)
    with pytest.raises(DataError, match=r"item 1: .*truncated.*--skip-broken"):
        list(batches(source, config, CROPS, train=True, epochs=1))


def test_a_damaged_shard_is_found_named_and_skipped(photos: Path, tmp_path: Path) -> None:
    folder = packed(photos, tmp_path / "files").folder
    shard = folder / "00001-of-00006.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    images = image_folder(folder, split="all")
    broken = find_broken(images, PLAIN, CROPS)
    assert list(broken) == list(images.files[4:8])
    assert all("the shard is truncated" in why for why in broken.values())
    with pytest.raises(DataError, match=r"00001-of-00006\.array_record: record 0 \(ant/4\.png\): the shard is trunc"):
        list(batches(images, PLAIN, CROPS, train=False))
    without = dataclasses.replace(PLAIN, batch_size=17)
    assert next(batches(images.without(broken), without, CROPS, train=True))["weight"].sum() == 17
    assert isinstance(images.packed, PackedImages)


CONFIG = FinetuneConfig(epochs=2, batch_size=4, workers=0, image_size=32, warmup_epochs=0, seed=1)


@pytest.mark.slow
def test_a_run_on_packed_photos_is_the_run_on_their_folders(photos: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "tiny.safetensors")
    finetune(photos, tmp_path / "folders", CONFIG, source=weights, progress=False)
    files = packed(photos, tmp_path / "files").folder
    finetune(files, tmp_path / "packed", CONFIG, source=weights, progress=False)
    assert contents(tmp_path / "packed") == contents(tmp_path / "folders")
    resumed = {}
    for name, then in (("folders again", photos), ("files again", files)):
        started = dataclasses.replace(CONFIG, epochs=1)
        finetune(photos, tmp_path / name, started, source=weights, progress=False)
        finetune(then, tmp_path / name, CONFIG, resume=True, progress=False)
        resumed[name] = contents(tmp_path / name)
    assert resumed["files again"] == resumed["folders again"], "a run may be moved to its packed images"


@pytest.mark.slow
def test_a_run_on_packed_crops(photos: Path, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "tiny.safetensors")
    crops = packed(photos, tmp_path / "crops", crops=CROPS).folder
    run = finetune(crops, tmp_path / "run", CONFIG, source=weights, progress=False)
    assert run.weights is not None and run.weights.exists()
    with pytest.raises(DataError, match="crops: its crops have image_size 32, but image_size 64 is needed"):
        larger = dataclasses.replace(CONFIG, image_size=64)
        finetune(crops, tmp_path / "larger", larger, source=weights, progress=False)
    assert not (tmp_path / "larger").exists()
    with pytest.raises(RunError, match="already exists"):
        finetune(crops, tmp_path / "run", CONFIG, source=weights, progress=False)
