import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.errors import DataError, ImageError
from dpn_jax.evaluation.classes import labeled_images, read_real_labels, read_valid_labels
from dpn_jax.evaluation.evaluate import collect, evaluate
from dpn_jax.evaluation.metrics import Evaluation
from dpn_jax.images.labels import imagenet_labels
from dpn_jax.images.sources import are_crops
from dpn_jax.images.splits import ImageFolder, list_images
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


def figures(result: Evaluation) -> tuple:
    """What two evaluations of the same images have in common, whatever the files are called."""
    return result.labels.tolist(), result.logits.tolist(), result.top1, result.top5


def test_failures_and_labels_stay_with_their_images() -> None:
    model = SimpleNamespace(labels=("ant", "bee", "cat"))
    rows = [np.eye(3, dtype=np.float32)[k] for k in (0, 1, 2)]
    rows.insert(1, ImageError("b.png: damaged"))
    folder = ImageFolder(model.labels, ("a.png", "b.png", "c.png", "d.png"), (0, 1, 1, 1))
    labels = dict(enumerate(folder.labels))
    result = collect(rows, folder, labels, model)
    assert result.files == ("a.png", "c.png", "d.png") and result.labels.tolist() == [0, 1, 1]
    assert (result.top1, result.top5, len(result.failures)) == ((2, 3), (3, 3), 1)
    with pytest.raises(ValueError, match="zip"):
        collect(rows[:3], folder, labels, model)
    judged = collect(rows, folder, labels, model, answers=[{2}, {1}, {0, 1}, ()])
    assert judged.top1 == (1, 2) and judged.confusion.tolist() == result.confusion.tolist()
    with pytest.raises(ValueError, match="answers must be as many as the images, 4, got 1"):
        collect(rows, folder, labels, model, answers=[{2}])
    chosen = collect(rows, folder, labels, model, valid_labels=[0, 1])
    assert chosen.predictions.tolist() == [0, 1, 0] and chosen.top(2) == (3, 3)
    with pytest.raises(ValueError, match="item 2: its class, 'bee', is not among valid_labels"):
        collect(rows, folder, labels, model, valid_labels=[0, 2])


def test_lists_of_classes(tmp_path: Path) -> None:
    model = classifier("ant", "bee", "cat")
    listed = tmp_path / "classes.txt"
    for text, expected in (("cat\n\nant\n", (0, 2)), ("1\n2", (1, 2))):
        listed.write_text(text)
        assert read_valid_labels(listed, model) == expected
    listed.write_text("n02123045\nn01440764\n")
    assert read_valid_labels(listed, classifier()) == (0, 281)
    for text, message in (
        ("\n", "lists no class"),
        ("ant\nant", "lists 'ant' twice"),
        ("ant\nfox", "1 of 2 lines are"),
    ):
        listed.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_valid_labels(listed, model)
    with pytest.raises(DataError, match=r"gone.txt: cannot be read as text"):
        read_valid_labels(tmp_path / "gone.txt", model)


def test_answers_judged_again(tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text("[[0], [], [1, 2]]")
    files = ["val/ant/ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000002.JPEG"]
    assert read_real_labels(real, files, 3) == ({1, 2}, set())
    for text, names, message in (
        ("[[3]]", files, "class indices, 0 to 2"),
        ("{}", files, "must be a list"),
        ("[[0]", files, "cannot be read as JSON"),
        ("[[0]]", files, "must be named ILSVRC2012_val_NUMBER, NUMBER from 1 to 1"),
        ("[[0]]", ["cat.jpg"], "cat.jpg: must be named"),
    ):
        real.write_text(text)
        with pytest.raises(DataError, match=message):
            read_real_labels(real, names, 3)


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
    result = evaluate(tested, images)
    np.testing.assert_allclose(result.logits, logits, rtol=1e-5, atol=1e-7)
    assert result.top1 == ((ranks[:, 0] == labels).sum(), 7)
    assert result.top(2) == ((ranks[:, :2] == labels[:, None]).any(axis=1).sum(), 7)


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
    assert all(figures(result) == figures(results[0]) and not result.failures for result in results)
    assert results[0].top5 == (8, 8) > results[0].top1
    assert results[0].files == folder.files and results[-1].files[-1] == "item 7"


def test_all_problems_of_a_csv_file_are_told_before_anything_runs(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    root = write_classes(tmp_path / "photos", 3, classes=("cat", "eel"))
    lines = ["photos/cat/0.png;cat", "photos/cat/gone.png;cat", "photos/eel/0.png;fox", "photos/cat/0.png;eel", ";cat"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["image;label", *lines]))
    with pytest.raises(ImageError) as error:
        evaluate(tested, table)
    assert str(error.value) == (
        f"{table}: 5 problems: line 1: columns separated by ';', expected commas; line 3: no such file "
        f"{root / 'cat' / 'gone.png'}; line 4: 'fox' is no class of the model; line 5: {root / 'cat' / '0.png'} again, "
        "as in line 2, as 'eel', not 'cat'; line 6: an image and a label expected; its classes are 'ant', 'bee', "
        "'cat', 'dog', 'eel'"
    )
    table.write_text("image,label\n" + "".join(f"{n}.png,cat\n" for n in range(30)))
    with pytest.raises(
        ImageError, match=r"30 problems: line 2: no .*; line 21: no such file .*/19.png; \.\.\. and 10 more$"
    ):
        labeled_images(table, tested)
    table.write_text("image,label\nphotos/cat/0.png,2\nphotos/eel/0.png,4\ns3://bucket/a.png,0\n")
    with pytest.raises(
        ImageError, match=r"table.csv: line 4: s3://bucket/a.png: a URL; only local files and gs:// can be"
    ):
        labeled_images(table, tested)


def test_failures_of_a_source_are_named_and_counted(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    good = np.zeros((40, 40, 3), np.uint8)
    source = [(good, 0), (b"no image", 0), "photo.jpg", (good, 4), (good, None), (tmp_path / "gone.png", 1)]
    result = evaluate(tested, source)
    assert result.top5 == (2, 2)
    assert [str(failure).partition(": ")[0] for failure in result.failures] == [
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
    result = evaluate(tested, folder)
    assert len(result) == len(result.failures) == 4
    assert "00001-of-00002.array_record: record 0 (eel/0.png): the shard is truncated" in str(result.failures[0])


def test_crops_of_another_geometry_are_refused(tmp_path: Path, tested: dpn_jax.Classifier) -> None:
    pytest.importorskip("array_record")
    root = write_classes(tmp_path / "photos", 1, classes=("cat", "eel"))
    larger = packed(root, tmp_path / "larger", crops=dataclasses.replace(CROPS, image_size=40))
    with pytest.raises(ImageError, match="larger: its crops have image_size 40, but image_size 32 is needed; pack the"):
        evaluate(tested, larger.folder)
    with pytest.raises(ImageError, match="without the EXIF orientation; go without --exif"):
        are_crops(packed(root, tmp_path / "same", crops=CROPS), dpn_jax.preprocessing(CROPS, exif=True))
