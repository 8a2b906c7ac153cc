"""What each path contributes, against networks taken apart by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax import explain
from dpn_jax.blocks import DualPath, DualPathBlock
from dpn_jax.config import DPNConfig
from dpn_jax.explain.paths import _ages
from dpn_jax.stock import changes
from tests.support.models import randomize

CONFIG = DPNConfig(
    depths=(3, 2),
    dense_increments=(4, 8),
    bottleneck_width=8,
    groups=4,
    residual_width=8,
    stem_features=4,
    num_classes=5,
)
IMAGES = np.random.default_rng(0).normal(size=(6, 32, 48, 3))


@pytest.fixture(scope="module")
def model() -> dpn_jax.DPN:
    with jax.enable_x64(True):
        return randomize(dpn_jax.create_model(CONFIG, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0)))


def test_ages_follow_what_the_blocks_append() -> None:
    first, second = CONFIG.stages
    # residual; the shortcut's two increments, then one for each block
    assert _ages(first, 1).tolist() == [0] * 8 + [1] * 12
    assert _ages(first, 3).tolist() == [0] * 8 + [3] * 12 + [2] * 4 + [1] * 4
    assert _ages(second, 2).tolist() == [0] * 16 + [2] * 24 + [1] * 8
    for stage in dpn_jax.create_model("dpn92").config.stages:
        assert all(len(_ages(stage, block)) == stage.block_in_channels(block) for block in range(1, stage.depth + 1))


def read_by(model: dpn_jax.DPN, images: jax.Array) -> list[tuple[DualPathBlock, DualPath]]:
    """Each block but the first, and what it reads."""
    x: Any = model.operations.max_pool(model.stem(images))
    found = []
    for block in (block for stage in model.stages for block in stage):
        found.append((block, x))
        x = block(x)
    return found[1:]


def test_shares_are_those_of_the_network_taken_apart(model: dpn_jax.DPN) -> None:
    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES)
        shares = explain.path_shares(model, images, 2)
        assert [(share.stage, share.block) for share in shares] == [(0, 1), (0, 2), (1, 0), (1, 1)]
        ages = [
            _ages(CONFIG.stages[0], 1),
            _ages(CONFIG.stages[0], 2),
            _ages(CONFIG.stages[0], 3),
            _ages(CONFIG.stages[1], 1),
        ]
        for (block, paths), share, age in zip(read_by(model, images), shares, ages, strict=True):
            x = np.concatenate(paths, -1)
            squares = np.bincount(age, (x**2).sum((0, 1, 2)))
            np.testing.assert_allclose([share.input.residual, *share.input.by_age], squares / squares.sum(), rtol=1e-10)
            # each group's own contribution to the convolution's output
            activated = np.concatenate(block.reduce.norm(paths), -1)
            kernel = np.asarray(block.reduce.conv.kernel[...])[0, 0]
            outputs = (activated @ kernel).reshape(-1, kernel.shape[1])
            total = outputs.var(axis=0).sum()
            for group, got in enumerate([share.preactivation.residual, *share.preactivation.by_age]):
                part = (activated * (age == group)) @ kernel
                part = part.reshape(outputs.shape)
                covariance = ((part - part.mean(0)) * (outputs - outputs.mean(0))).mean(0).sum()
                np.testing.assert_allclose(got, covariance / total, rtol=1e-8, atol=1e-12)
            assert abs(share.preactivation.residual + share.preactivation.dense - 1) < 1e-10


def test_gradients_are_those_of_the_loss(model: dpn_jax.DPN) -> None:
    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES)

        def loss(x: DualPath) -> jax.Array:  # from the last block's input on
            x = DualPath(*model.norm(model.stages[1][1](x)))
            logits = model.forward_head(jnp.concatenate(x, -1))
            return -jax.nn.log_softmax(logits)[:, 2].sum()

        paths = read_by(model, images)[-1][1]
        squares = np.bincount(
            _ages(CONFIG.stages[1], 1), (np.concatenate(jax.grad(loss)(paths), -1) ** 2).sum((0, 1, 2))
        )
        share = explain.path_shares(model, images, 2)[-1].gradient
        np.testing.assert_allclose([share.residual, *share.by_age], squares / squares.sum(), rtol=1e-8)


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"path": "dense"}, lambda stage, ages: ages > 0),
        ({"path": "residual"}, lambda stage, ages: ages == 0),
        ({"older_than": 1}, lambda stage, ages: ages > 1),
        ({"older_than": 2, "stages": [0]}, lambda stage, ages: (ages > 2) & (stage == 0)),
        ({"path": "dense", "stages": [1]}, lambda stage, ages: (ages > 0) & (stage == 1)),
    ],
    ids=["dense", "residual", "older than 1", "older than 2 of stage 0", "dense of stage 1"],
)
def test_ablation_hides_features_from_whoever_reads_them(
    model: dpn_jax.DPN, options: dict[str, Any], gone: Callable[[int, np.ndarray], np.ndarray], fill: str
) -> None:
    """By hand: what is read is replaced before the norm (its running mean) or after the activation (zero)."""

    def hidden(norm: Any, x: DualPath, mask: np.ndarray) -> jax.Array:
        x = jnp.concatenate(x, -1)
        if fill == "mean":
            return norm(jnp.where(mask, norm.mean[...], x))
        return jnp.where(mask, 0, norm(x))

    with jax.enable_x64(True):
        x: Any = model.operations.max_pool(model.stem(jnp.asarray(IMAGES)))
        for number, stage in enumerate(model.stages):
            for index, block in enumerate(stage):
                if not isinstance(x, DualPath):
                    x = block(x)
                    continue
                made_in = number if index else number - 1
                mask = gone(made_in, _ages(CONFIG.stages[made_in], index or len(model.stages[made_in])))
                paths = x
                if block.shortcut is not None:
                    y = block.shortcut.conv(hidden(block.shortcut.norm, x, mask))
                    paths = DualPath(*jnp.split(y, [block.residual_channels], -1))
                y = block.expand(block.grouped(block.reduce.conv(hidden(block.reduce.norm, x, mask))))
                x = DualPath(paths.residual + y.residual, jnp.concatenate([paths.dense, y.dense], -1))
        mask = gone(1, _ages(CONFIG.stages[1], 2))
        expected = model.forward_head(hidden(model.norm, x, mask))

        without = explain.ablate(model, fill=fill, **options)
        got = nnx.jit(lambda model, images: model(images))(without, jnp.asarray(IMAGES))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
        whole = nnx.jit(lambda model, images: model(images))(model, jnp.asarray(IMAGES))
        assert np.abs(got - whole).max() > 1e-3
        assert changes(without) == {}
        np.testing.assert_allclose(dpn_jax.fast_forward(without)(jnp.asarray(IMAGES)), got, rtol=1e-8, atol=1e-8)


def test_nothing_older_than_the_oldest(model: dpn_jax.DPN) -> None:
    with jax.enable_x64(True):
        same = explain.ablate(model, older_than=3)
        for a, b in zip(*(jax.tree.leaves(nnx.state(each)) for each in (model, same)), strict=True):
            np.testing.assert_array_equal(a, b)


class Normless(nnx.Module):
    def __init__(self, *args: Any, **options: Any) -> None:
        self.block = DualPathBlock(*args, **options)

    def __call__(self, x: Any) -> DualPath:
        return self.block(x)


def test_other_blocks_are_named() -> None:
    model = dpn_jax.create_model(CONFIG, block=Normless)
    with pytest.raises(ValueError, match=r"stages.0.1 has no reduce with a norm and a convolution"):
        explain.path_shares(model, np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match=r"stages.0.1.reduce.norm must be a NormAct of 20 channels, got a NoneType"):
        explain.ablate(model, path="dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of path and older_than, got path=None, older_than=None"),
        ({"path": "dense", "older_than": 1}, "give one of path and older_than"),
        ({"path": "both"}, "path must be 'residual' or 'dense', got 'both'"),
        ({"older_than": -1}, "older_than must be an integer of at least 0, blocks, got -1"),
        ({"path": "dense", "stages": [2]}, "stages must be in 0 to 1, got 2"),
        ({"path": "dense", "fill": "noise"}, "fill must be 'mean' or 'zero', got 'noise'"),
    ],
)
def test_bad_arguments_of_ablate(model: dpn_jax.DPN, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain.ablate(model, **options)
