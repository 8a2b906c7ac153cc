"""The trained model in the package."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.images.splits import image_folder
from dpn_jax.pretrained import PRETRAINED

TAG = "dpn_tiny.digits"
SAMPLES = sorted((Path(__file__).parents[2] / "samples" / "digits").glob("*.png"))


def test_samples_are_recognized() -> None:
    found = dpn_jax.Classifier.from_pretrained(TAG)(SAMPLES, top_k=1)
    assert [best.label for (best,) in found] == [path.stem for path in SAMPLES] == list("0123456789")


def test_the_tag_says_what_the_file_says() -> None:
    model = dpn_jax.from_pretrained(TAG)
    assert model.config == PRETRAINED[TAG].config
    assert model.provenance.preprocessing == PRETRAINED[TAG].preprocessing == dpn_jax.preprocessing(TAG).preprocessing
    assert (Path(dpn_jax.__file__).parent / "checkpoint" / PRETRAINED[TAG].packaged).stat().st_size < 2e6


def test_the_held_out_fifth(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    from recipes import digits_folder

    digits_folder.main(tmp_path / "digits")
    train, val = (image_folder(tmp_path / "digits", split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1442, 355)
    found = dpn_jax.Classifier.from_pretrained(TAG, batch_size=64)([str(file) for file in val.files], top_k=1)
    right = np.mean([best.index == label for (best,), label in zip(found, val.labels, strict=True)])
    assert 100 * right == pytest.approx(PRETRAINED[TAG].top1, abs=0.3)  # one image is 0.28
    assert right >= 0.985


def test_timm_gives_the_same_answers(timm_models: ModuleType, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "timm.safetensors"
    source = Path(dpn_jax.__file__).parent / "checkpoint" / PRETRAINED[TAG].packaged
    convert(source, path)
    theirs = create_timm_model(PRETRAINED[TAG].config)
    theirs.load_state_dict(load_file(path), strict=True)
    classifier = dpn_jax.Classifier.from_pretrained(TAG)
    images = np.stack([classifier.transform(sample) for sample in SAMPLES])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = classifier.logits(images)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert got.argmax(1).tolist() == expected.argmax(1).tolist() == list(range(10))
