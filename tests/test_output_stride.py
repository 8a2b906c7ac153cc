"""Dilated networks hold the stride-32 network's features, at every second or fourth place."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax.config import DPNConfig
from dpn_jax.fast.plan import PLANS
from tests.support.models import randomize

CONFIG = DPNConfig(
    depths=(1, 1, 2, 2),
    dense_increments=(4, 4, 4, 4),
    bottleneck_width=8,
    groups=4,
    residual_width=8,
    stem_features=4,
    num_classes=5,
)
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}


def made(output_stride: int, config: DPNConfig = CONFIG, **options: object) -> dpn_jax.DPN:
    """Networks of different strides and the same random values."""
    return randomize(dpn_jax.create_model(config, output_stride=output_stride, **options, rngs=nnx.Rngs(0)))


@nnx.jit
def intermediates(model: dpn_jax.DPN, images: jax.Array) -> list[jax.Array]:
    return [*model.forward_intermediates(images, intermediates_only=True), model.forward_features(images)]


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("size", [(64, 96), (75, 131)])
def test_what_the_plain_network_computes_is_among_the_features(output_stride: int, size: tuple[int, int]) -> None:
    with jax.enable_x64(True):
        plain, fine = made(32, **DOUBLE), made(output_stride, **DOUBLE)
        images = jax.random.normal(jax.random.key(0), (2, *size, 3), "float64")
        infos = zip(
            [*plain.feature_info, plain.feature_info[-1]], [*fine.feature_info, fine.feature_info[-1]], strict=True
        )
        maps = zip(infos, intermediates(plain, images), intermediates(fine, images), strict=True)
        for (expected_info, info), expected, got in maps:
            step = expected_info.reduction // info.reduction
            assert info.reduction == min(expected_info.reduction, output_stride)
            assert got.shape[1:3] == tuple(-(-side // info.reduction) for side in size)
            assert got.shape[-1] == info.channels == expected_info.channels
            if step == 1:
                np.testing.assert_array_equal(got, expected)
            else:
                np.testing.assert_allclose(got[:, ::step, ::step], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("output_stride", "shift"), [(16, (16, 0)), (8, (8, 24)), (8, (16, 16))])
def test_the_other_features_are_those_of_a_shifted_image(output_stride: int, shift: tuple[int, int]) -> None:
    """Away from the borders, the places between are what the plain network gives for the image moved there."""
    with jax.enable_x64(True):
        plain, fine = made(32, **DOUBLE), made(output_stride, **DOUBLE)
        image = np.zeros((1, 704, 704, 3))  # the blocks see about 300 pixels around
        image[:, 320:384, 320:384] = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
        moved = np.roll(image, (-shift[0], -shift[1]), axis=(1, 2))
        got = np.asarray(intermediates(fine, jnp.asarray(image))[-1])
        expected = np.asarray(intermediates(plain, jnp.asarray(moved))[-1])
        step, (y, x) = 32 // output_stride, (side // output_stride for side in shift)
        got = got[:, y::step, x::step]
        middle = slice(9, 13)  # the places around pixel 352
        np.testing.assert_allclose(got[:, middle, middle], expected[:, middle, middle], rtol=1e-10, atol=1e-10)
        assert np.ptp(expected[:, middle, middle]) > 0.1


@pytest.mark.parametrize(("backend", "groups"), [*((backend, 4) for backend in PLANS), ("cpu", 1)])
def test_the_fast_forms_are_the_model(backend: str, groups: int) -> None:
    with jax.enable_x64(True):
        model = made(8, CONFIG.replace(groups=groups), **DOUBLE)
        images = jax.random.normal(jax.random.key(0), (2, 45, 70, 3), "float64")
        expected = nnx.jit(lambda model, images: model(images))(model, images)
        got = dpn_jax.fast_forward(model, backend=backend)(images)
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "groups"), [("cpu", 4), ("tpu", 4), ("cpu", 1)])
def test_fast_training_is_the_models(backend: str, groups: int) -> None:
    with jax.enable_x64(True):
        model = made(8, CONFIG.replace(groups=groups), **DOUBLE)
        images = jax.random.normal(jax.random.key(0), (3, 45, 70, 3), "float64")
        model.train()

        def gradients(apply: Callable[[dpn_jax.DPN], jax.Array]) -> list[jax.Array]:
            return jax.tree.leaves(nnx.jit(nnx.grad(lambda model: jnp.square(apply(model)).sum()))(nnx.clone(model)))

        plain = gradients(lambda model: model(images))
        fast = gradients(lambda model: dpn_jax.fast_apply(model, images, backend=backend))
        for expected, got in zip(plain, fast, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_saving_keeps_it_and_loading_sets_it(tmp_path: Path) -> None:
    fine = made(16)
    dpn_jax.save(fine, tmp_path / "fine.safetensors")
    assert dpn_jax.load(tmp_path / "fine.safetensors").config == fine.config
    plain = dpn_jax.load(tmp_path / "fine.safetensors", output_stride=32)
    assert [info.reduction for info in plain.feature_info] == [2, 4, 8, 16, 32]
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    np.testing.assert_array_equal(intermediates(plain, images)[-1], intermediates(made(32), images)[-1])
    with pytest.raises(dpn_jax.CheckpointError, match="output_stride 16 in the file, 32 in the model"):
        dpn_jax.load(tmp_path / "fine.safetensors", into=made(32))


def test_an_exported_network_keeps_it(tmp_path: Path) -> None:
    fine = made(8, CONFIG.replace(global_pool=""))
    dpn_jax.export_model(fine, tmp_path / "fine.jaxexport", image_size=64)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)
    got = dpn_jax.load_exported(tmp_path / "fine.jaxexport").call(images)
    assert got.shape == (1, 8, 8, 5)
    np.testing.assert_allclose(got, nnx.jit(lambda model, images: model(images))(fine, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 5])
def test_networks_of_other_depths(stages: int) -> None:
    config = CONFIG.replace(depths=(1,) * stages, dense_increments=(4,) * stages)
    assert [info.reduction for info in config.feature_info] == [2, *(4 * 2**stage for stage in range(stages))]
    assert config.replace(output_stride=16).feature_info[-1].reduction == min(16, 2 * 2**stages)


@pytest.mark.parametrize("value", [4, 64, 16.0, "8", None, True])
def test_other_strides_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"output_stride must be one of \(32, 16, 8\), got "):
        dpn_jax.create_model("dpn68", output_stride=value)
