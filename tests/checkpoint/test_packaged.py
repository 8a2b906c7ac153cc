"""The trained models in the package."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.images.splits import image_folder
from dpn_jax.pretrained import PRETRAINED

PHOTOS = Path(__file__).parents[2] / "samples"
DIGITS = "dpn_tiny.digits"
PHOTO_LABELS = {"cat": "cat", "dog": "dog", "horses": "horse", "kingfisher": "bird", "moose": "deer"}
SAMPLES = {
    DIGITS: {path: path.stem for path in sorted((PHOTOS / "digits").glob("*.png"))},
    "dpn_tiny.cifar10": {PHOTOS / f"{name}.jpg": label for name, label in PHOTO_LABELS.items()},
}


@pytest.mark.parametrize("tag", SAMPLES)
def test_samples_are_recognized(tag: str) -> None:
    found = dpn_jax.Classifier.from_pretrained(tag)(list(SAMPLES[tag]), top_k=1)
    assert [best.label for (best,) in found] == list(SAMPLES[tag].values())


@pytest.mark.parametrize("tag", [tag for tag, known in PRETRAINED.items() if known.packaged])
def test_the_tag_says_what_the_file_says(tag: str) -> None:
    model, known = dpn_jax.from_pretrained(tag), PRETRAINED[tag]
    assert model.config == known.config
    assert model.provenance.preprocessing == known.preprocessing == dpn_jax.preprocessing(tag).preprocessing
    assert len(model.provenance.class_names) == known.num_classes
    assert (Path(dpn_jax.__file__).parent / "checkpoint" / known.packaged).stat().st_size < 2e6


def test_the_held_out_fifth(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    from recipes import digits_folder

    digits_folder.main(tmp_path / "digits")
    train, val = (image_folder(tmp_path / "digits", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    found = dpn_jax.Classifier.from_pretrained(DIGITS, batch_size=64)([str(file) for file in val.files], top_k=1)
    right = np.mean([best.index == label for (best,), label in zip(found, val.labels, strict=True)])
    assert 100 * right == pytest.approx(PRETRAINED[DIGITS].top1, abs=0.3)  # one image is 0.28
    assert right >= 0.985


@pytest.mark.parametrize("tag", SAMPLES)
def test_timm_gives_the_same_answers(tag: str, timm_models: ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "timm.safetensors"
    source = Path(dpn_jax.__file__).parent / "checkpoint" / PRETRAINED[tag].packaged
    convert(source, path)
    theirs = create_timm_model(PRETRAINED[tag].config)
    theirs.load_state_dict(load_file(path), strict=True)
    classifier = dpn_jax.Classifier.from_pretrained(tag)
    images = np.stack([classifier.transform(sample) for sample in SAMPLES[tag]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = classifier.logits(images)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert got.argmax(1).tolist() == expected.argmax(1).tolist()
    assert [classifier.labels[best] for best in got.argmax(1)] == list(SAMPLES[tag].values())
