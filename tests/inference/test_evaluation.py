from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.errors import ImageError
from dpn_jax.images.labels import imagenet_labels
from dpn_jax.inference.classifier import Prediction
from dpn_jax.inference.evaluation import labeled_images, score
from tests.support.models import TINY


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
    examples = labeled_images(class_folders(tmp_path, *names), classifier(*labels))
    assert [example.label for example in examples] == expected
    assert [example.path for example in examples] == [tmp_path / name / "photo.png" for name in sorted(names)]


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
    examples = labeled_images(root, tested)
    logits = tested.logits(np.stack([transform(path) for path, _ in examples]))
    labels = np.array([label for _, label in examples])
    ranks = np.argsort(-logits, axis=1)
    accuracy = score(tested.stream([path for path, _ in examples], top_k=2), labels)
    assert accuracy[:3] == (7, (ranks[:, 0] == labels).sum(), (ranks[:, :2] == labels[:, None]).any(axis=1).sum())
