"""The trained models in the package, and the recipes' data."""

import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.images.splits import image_folder
from dpn_jax.pretrained import PRETRAINED
from recipes import cifar10_folder

SAMPLES = Path(__file__).parents[2] / "samples"
PHOTOS = {"cat": "cat", "horses": "horse", "kingfisher": "bird", "moose": "deer"}  # and it takes the dog for a cat
EXPECTED = {
    "dpn_tiny.digits": {SAMPLES / "digits" / f"{digit}.png": digit for digit in "0123456789"},
    "dpn_mini.cifar10": {SAMPLES / f"{name}.jpg": label for name, label in PHOTOS.items()},
}
each_tag = pytest.mark.parametrize("tag", EXPECTED)


def test_every_packaged_model_is_tested() -> None:
    assert [name for name, tag in PRETRAINED.items() if tag.packaged] == list(EXPECTED)


@each_tag
def test_samples_are_recognized(tag: str) -> None:
    found = dpn_jax.Classifier.from_pretrained(tag)(list(EXPECTED[tag]), top_k=1)
    assert [best.label for (best,) in found] == list(EXPECTED[tag].values())


@each_tag
def test_the_tag_says_what_the_file_says(tag: str) -> None:
    model = dpn_jax.from_pretrained(tag)
    assert model.config == PRETRAINED[tag].config
    assert model.provenance.preprocessing == PRETRAINED[tag].preprocessing == dpn_jax.preprocessing(tag).preprocessing
    assert (Path(dpn_jax.__file__).parent / "checkpoint" / PRETRAINED[tag].packaged).stat().st_size < 2e6


def test_the_held_out_fifth_of_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from recipes import digits_folder

    digits_folder.main(tmp_path / "digits")
    train, val = (image_folder(tmp_path / "digits", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    digits_folder.main(tmp_path / "few", per_class=30)
    few = [image_folder(tmp_path / "few", split=split) for split in ("train", "val")]
    assert [len(images) for images in few] == [300, 355]
    assert {Path(file).name for file in few[1].files} == {Path(file).name for file in val.files}
    tag = "dpn_tiny.digits"
    found = dpn_jax.Classifier.from_pretrained(tag, batch_size=64)([str(file) for file in val.files], top_k=1)
    right = np.mean([best.index == label for (best,), label in zip(found, val.labels, strict=True)])
    assert 100 * right == pytest.approx(PRETRAINED[tag].top1, abs=0.3)  # one image is 0.28
    assert right >= 0.985


@each_tag
def test_timm_gives_the_same_answers(tag: str, timm_models: ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "timm.safetensors"
    convert(Path(dpn_jax.__file__).parent / "checkpoint" / PRETRAINED[tag].packaged, path)
    theirs = create_timm_model(PRETRAINED[tag].config)
    theirs.load_state_dict(load_file(path), strict=True)
    classifier = dpn_jax.Classifier.from_pretrained(tag)
    images = np.stack([classifier.transform(sample) for sample in EXPECTED[tag]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = classifier.logits(images)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    answers = [classifier.labels[index] for index in expected.argmax(1)]
    assert [classifier.labels[index] for index in got.argmax(1)] == answers == list(EXPECTED[tag].values())


@pytest.mark.parametrize("source", ["archive", "hub"])
def test_the_folder_of_cifar10(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [(split, name, index) for split in ("train", "test") for name in ("cat", "dog") for index in range(11)]
    photos = {row: Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for row in rows}
    if source == "archive":
        archive = tmp_path / "photos.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("photos/train/README.md", "not a photo")
            for (split, name, index), photo in photos.items():
                photo.save(tmp_path / "photo.png")
                file.write(tmp_path / "photo.png", f"photos/{split}/{name}/{index:04}.png")
        cifar10_folder.main(tmp_path / "cifar10", archive=archive)
    else:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])},
        )
        made = datasets.DatasetDict()
        for split in ("train", "test"):
            chosen = [row for row in rows if row[0] == split]
            columns = {
                "img": [photos[row] for row in chosen],
                "label": [["cat", "dog"].index(row[1]) for row in chosen],
            }
            made[split] = datasets.Dataset.from_dict(columns, features=features)
        monkeypatch.setattr(datasets, "load_dataset", {"uoft-cs/cifar10": made}.__getitem__)
        cifar10_folder.main(tmp_path / "cifar10")
    for name in ("cat", "dog"):
        found = {split: sorted((tmp_path / "cifar10" / split / name).iterdir()) for split in ("train", "val", "test")}
        assert {split: len(files) for split, files in found.items()} == {"train": 9, "val": 2, "test": 11}
        for files, split in ((found["train"] + found["val"], "train"), (found["test"], "test")):
            for index, file in enumerate(files):
                assert np.array_equal(Image.open(file), photos[split, name, index])
    with pytest.raises(FileExistsError):
        cifar10_folder.main(tmp_path / "cifar10")
