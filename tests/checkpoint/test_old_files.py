"""Files that an earlier version saved still load, and give the logits that it gave.

`data/` was written by commit 8151383 (version 0.1, before the packages): a small model with random norms, and the
logits of both models in float64, from the plain form.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dpn_jax

DATA = Path(__file__).with_name("data")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", ["version_0.1", "dpn_tiny.digits"])
def test_logits_are_what_they_were(name: str) -> None:
    source = DATA / f"{name}.safetensors"
    model = dpn_jax.from_pretrained(source if source.exists() else name, dtype="float64", param_dtype="float64")
    images = np.random.default_rng(0).normal(size=(2, 40, 48, model.config.in_channels))
    with np.load(DATA / "logits.npz") as logits:
        np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, images), logits[name], rtol=0, atol=1e-6)


def test_config_and_provenance_are_what_they_were() -> None:
    model = dpn_jax.load(DATA / "version_0.1.safetensors")
    assert model.config == dpn_jax.DPNConfig(
        depths=(2, 1), dense_increments=(4, 8), bottleneck_width=8, groups=4, residual_width=16, stem_features=6,
        stem_kernel=3, split_expand=True, outer_activation="silu", num_classes=3, in_channels=1,
        global_pool="catavgmax", drop_rate=0.25,
    )  # fmt: skip
    assert model.provenance.source == "mine"
    assert model.provenance.class_names == ("ant", "bee", "cat")
    assert model.provenance.preprocessing == dpn_jax.Preprocessing(
        image_size=48, crop_fraction=0.9, interpolation="bilinear", mean=(0.5,), std=(0.25,)
    )
    assert int(model.norm.steps[...]) == 7
