"""The whole way from files to labels, against timm's own: its transform, its model, torch's top-k."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tests.support.timm_models")
pytest.importorskip("tests.support.photos")
import torch

import dpn_jax
from tests.support.photos import PHOTOS
from tests.support.timm_models import randomized, relative_error, save_timm, timm


def timm_logits(model: torch.nn.Module, tag: str) -> torch.Tensor:
    """What a user of timm runs."""
    data = timm.data
    config = data.resolve_data_config(timm.get_pretrained_cfg(tag).to_dict())
    transform = data.create_transform(**config, is_training=False)
    with torch.no_grad():
        return model(torch.stack([transform(Image.open(photo).convert("RGB")) for photo in PHOTOS]))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("tag", [pytest.param("dpn68b.ra_in1k", marks=pytest.mark.exhaustive), "dpn92.mx_in1k"])
def test_top5_of_real_photos_equals_timms(tag: str, tmp_path: Path) -> None:
    assert len(PHOTOS) >= 8
    theirs = randomized(tag.split(".")[0], dtype=torch.float32)
    path = save_timm(theirs, tmp_path / "model.safetensors")
    expected = timm_logits(theirs, tag)
    classifier = dpn_jax.Classifier.from_pretrained(path, transform=dpn_jax.preprocessing(tag), batch_size=8)

    logits = classifier.logits(np.stack([classifier.transform(photo) for photo in PHOTOS]))
    assert relative_error(logits, expected.numpy()) <= 1e-5

    probabilities, best = torch.softmax(expected, dim=1).topk(5)
    for got, indices, scores in zip(classifier(PHOTOS, top_k=5), best.tolist(), probabilities.tolist(), strict=True):
        assert [prediction.index for prediction in got] == indices
        np.testing.assert_allclose([prediction.probability for prediction in got], scores, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.optimized
def test_bfloat16_agrees_with_float32_on_real_photos(tmp_path: Path) -> None:
    path = save_timm(randomized("dpn68b", dtype=torch.float32), tmp_path / "model.safetensors")
    transform = dpn_jax.preprocessing("dpn68b.mx_in1k")
    images = np.stack([transform(photo) for photo in PHOTOS])
    full, half = (
        dpn_jax.Classifier.from_pretrained(path, transform=transform, dtype=dtype).logits(images).astype(np.float64)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    cosine = (full * half).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(half, axis=1)
    assert cosine.min() >= 0.999
    assert (full.argmax(1) == half.argmax(1)).mean() >= 0.98
