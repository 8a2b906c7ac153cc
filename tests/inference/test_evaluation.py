import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.errors import ImageError
from dpn_jax.images.labels import imagenet_labels
from dpn_jax.images.sources import are_crops
from dpn_jax.images.splits import list_images
from dpn_jax.inference.classifier import Prediction
from dpn_jax.inference.evaluation import evaluate, labeled_images, score
from tests.support.models import TINY
from tests.support.packs import CROPS, packed, write_classes


def classifier(*labels: str) -> SimpleNamespace:
    """The attributes used here; without labels, ImageNet's."""
    synsets, names = zip(*imagenet_labels(), strict=True)
    return SimpleNamespace(labels=labels or names, synsets=(None,) * len(labels) or synsets)


def class_folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "photo.png")
    return root


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (("ant", "bee", "cat"), ("bee", "cat"), [1, 2]),
        (("ant", "bee", "cat"), ("00", "1", "2"), [0, 1, 2]),
        (("3", "1", "2"), ("1", "2", "3"), [1, 2, 0]),
        ((), ("n01440764", "n02123045"), [0, 281]),
        ((), ("tabby, tabby cat", "tench, Tinca tinca"), [281, 0]),
        ((), ("0", "281", "999"), [0, 281, 999]),
    ],
)
def test_folders_are_labels_synsets_or_numbers(
    tmp_path: Path, labels: tuple[str, ...], names: tuple[str, ...], expected: list[int]
) -> None:
    images = labeled_images(class_folders(tmp_path, *names), classifier(*labels))
    assert list(images.labels) == expected
    assert list(images.files) == [str(tmp_path / name / "photo.png") for name in sorted(names)]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (("ant", "bee"), ("ant", "dog", "eel"), "2 of 3 class folders .*: 'dog', 'eel'; its classes are 'ant', 'bee'$"),
        (("ant", "bee"), ("2", "dog"), "2 of 2 .*: '2', 'dog'"),
        (("1", "2"), ("0", "1"), "1 of 2 .*: '0'; its classes are '1', '2'"),  # not class number 1
        (("ant", "bee"), ("0", "bee"), "1 of 2"),  # one way of naming, not two
        ((), ("crane",), "'crane'"),  # a bird and a machine
        (("ant", "bee"), ("train", "val"), "'train', 'val'; .* to evaluate train or val, name that folder"),
        (("ant", "bee"), tuple("abcdefg"), "7 of 7 .*: 'a', 'b', 'c', 'd', 'e', ...; its"),
    ],
)
def test_unknown_folders_are_named(
    tmp_path: Path, labels: tuple[str, ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        labeled_images(class_folders(tmp_path, *names), classifier(*labels))


def test_folders_without_anything(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no class folders"):
        labeled_images(class_folders(tmp_path, ".hidden"), classifier("ant"))
    (tmp_path / "ant").mkdir()
    with pytest.raises(ImageError, match="ant: the class has no images"):
        labeled_images(tmp_path, classifier("ant"))


def test_score_counts_ranks_and_failures() -> None:
    def ranked(*order: int) -> list[Prediction]:
        return [Prediction(str(index), 0.1, index) for index in order]

    broken = ImageError("broken.png: damaged")
    results = [ranked(0, 1, 2, 3, 4), ranked(1, 2, 3, 4, 0), broken, ranked(1, 2, 3, 4, 5), ranked(1, 2, 3, 4, 5, 0)]
    assert score(results, [0] * 5) == (4, 1, 2, (broken,))
    with pytest.raises(ValueError, match="zip"):
        score(results, [0] * 4)


def test_the_score_is_that_of_the_logits(tmp_path: Path) -> None:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    transform = dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32))
    tested = dpn_jax.Classifier(model, transform=transform, labels="abcde", batch_size=4)
    root = class_folders(tmp_path, "b", "e")
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(root / "b" / f"{seed}.png")
    images = labeled_images(root, tested)
    logits = tested.logits(np.stack([transform(path) for path in images.files]))
    labels = np.array(images.labels)
    ranks = np.argsort(-logits, axis=1)
    accuracy = score(tested.stream(images.files, top_k=2), labels)
    assert accuracy[:3] == (7, (ranks[:, 0] == labels).sum(), (ranks[:, :2] == labels[:, None]).any(axis=1).sum())


@pytest.fixture(scope="module")
def tested() -> dpn_jax.Classifier:
    transform = dpn_jax.preprocessing(CROPS)
    return dpn_jax.Classifier(
        dpn_jax.create_model(TINY, rngs=nnx.Rngs(0)), transform=transform, labels=("ant", "bee", "cat", "dog", "eel")
    )


def test_every_kind_of_source_gives_the_same_accuracy(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    pytest.importorskip("array_record")
    datasets = pytest.importorskip("datasets")
    root = write_classes(tmp_path / "photos", 4, classes=("cat", "eel"))
    folder = list_images(root)
    rows = [f"photos/{Path(file).relative_to(root)},{Path(file).parent.name}" for file in folder.files]
    (tmp_path / "table.csv").write_text("\n".join(["image,label", *rows]))
    labels = [(2, 4)[label] for label in folder.labels]
    columns = {"image": [{"bytes": Path(file).read_bytes()} for file in folder.files], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    results = [
        evaluate(tested, source)
        for source in (
            root,
            str(tmp_path / "table.csv"),
            packed(root, tmp_path / "files").folder,
            packed(root, tmp_path / "crops", crops=CROPS).folder,
            packed(root, tmp_path / "crops", crops=CROPS),
            folder,
            labeled_images(root, tested),
            list(zip(folder.files, labels, strict=True)),
            datasets.Dataset.from_dict(columns, features=features),
        )
    ]
    assert results == results[:1] * 9 and results[0].images == 8 and not results[0].failures
    assert results[0].top5 == 8 > results[0].top1


def test_failures_of_a_source_are_named_and_counted(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    good = np.zeros((40, 40, 3), np.uint8)
    source = [(good, 0), (b"no image", 0), "photo.jpg", (good, 4), (good, None), (tmp_path / "gone.png", 1)]
    accuracy = evaluate(tested, source)
    assert (accuracy.images, accuracy.top5) == (2, 2)
    assert [str(failure).partition(": ")[0] for failure in accuracy.failures] == [
        "item 1", "item 2", "item 4", str(tmp_path / "gone.png")
    ]  # fmt: skip
    with pytest.raises(ValueError, match="item 1: its label is 5, but the model has 5 classes"):
        evaluate(tested, [(good, 4), (good, 5)])


def test_a_damaged_shard_is_counted(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    pytest.importorskip("array_record")
    root = write_classes(tmp_path / "photos", 4, classes=("cat", "eel"))
    folder = packed(root, tmp_path / "crops", crops=CROPS).folder
    shard = folder / "00001-of-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    accuracy = evaluate(tested, folder)
    assert accuracy.images == len(accuracy.failures) == 4
    assert "00001-of-00002.array_record: record 0 (eel/0.png): the shard is truncated" in str(accuracy.failures[0])


def test_crops_of_another_geometry_are_refused(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    pytest.importorskip("array_record")
    root = write_classes(tmp_path / "photos", 1, classes=("cat", "eel"))
    larger = packed(root, tmp_path / "larger", crops=dataclasses.replace(CROPS, image_size=40))
    with pytest.raises(ImageError, match="larger: its crops have image_size 40, but image_size 32 is needed; pack the"):
        evaluate(tested, larger.folder)
    with pytest.raises(ImageError, match="without the EXIF orientation; go without --exif"):
        are_crops(packed(root, tmp_path / "same", crops=CROPS), dpn_jax.preprocessing(CROPS, exif=True))
