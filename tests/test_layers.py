import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpn_jax import layers, operations


def test_parts_give_what_the_whole_map_gives() -> None:
    unit = layers.NormActConv(12, 5, kernel_size=3, rngs=nnx.Rngs(0))
    key = jax.random.key(1)
    unit.norm.scale.set_value(jax.random.normal(key, (12,)))
    unit.norm.bias.set_value(jax.random.normal(key, (12,)))
    x = jax.random.normal(key, (2, 6, 7, 12))
    apply = nnx.jit(lambda unit, x: unit(x))
    for mode in (unit.train, unit.eval):  # training moves the running statistics, which eval then uses
        mode()
        parts = nnx.clone(unit)
        got, expected = apply(parts, (x[..., :7], x[..., 7:])), apply(unit, x)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(parts.norm.mean[...], unit.norm.mean[...], rtol=1e-6)
        np.testing.assert_allclose(parts.norm.var[...], unit.norm.var[...], rtol=1e-6)
        assert int(parts.norm.steps[...]) == int(unit.norm.steps[...]) == 1


def test_variance_survives_a_large_mean() -> None:
    norm = layers.NormAct(1, rngs=nnx.Rngs(0))
    x = 3e4 + jnp.linspace(-1, 1, 64).reshape(4, 4, 4, 1)  # E[x^2] - E[x]^2 gives noise of about +-60 here
    y = norm(x)
    np.testing.assert_allclose(y, jax.nn.relu((x - x.mean()) / jnp.sqrt(x.var() + 1e-3)), rtol=1e-2, atol=1e-2)
    assert 0 < float(norm.var[0]) - 0.9 < 0.1


def test_running_variance_is_unbiased() -> None:
    norm = layers.NormAct(1, rngs=nnx.Rngs(0))
    norm(jnp.array([0.0, 2.0]).reshape(2, 1, 1, 1))
    np.testing.assert_allclose(norm.var[...], 0.9 * 1 + 0.1 * 2)  # biased it is 1, unbiased 2
    np.testing.assert_allclose(norm.mean[...], 0.1)


def test_one_value_per_channel_cannot_train() -> None:
    norm = layers.NormAct(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(jnp.ones((1, 1, 1, 3)))
    norm.eval()
    assert norm(jnp.ones((1, 1, 1, 3))).shape == (1, 1, 1, 3)


@pytest.mark.parametrize("size", [8, 9])
def test_padding_is_explicit_not_same(size: int) -> None:
    conv = layers.Conv(1, 1, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
    conv.kernel.set_value(jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1))  # keeps every other pixel, from the first
    x = jnp.arange(size * size, dtype=jnp.float32).reshape(1, size, size, 1)
    np.testing.assert_array_equal(conv(x), x[:, ::2, ::2])


def test_max_pool_pads_with_minus_infinity() -> None:
    assert float(operations.max_pool(-jnp.ones((1, 4, 4, 1))).max()) == -1


@pytest.mark.parametrize(("groups", "kernel_size", "use_bias"), [(1, 1, True), (1, 7, False), (4, 3, False)])
def test_initial_values_have_torchs_distribution(groups: int, kernel_size: int, use_bias: bool) -> None:
    conv = layers.Conv(64, 256, kernel_size=kernel_size, groups=groups, use_bias=use_bias, rngs=nnx.Rngs(0))
    limit = (kernel_size**2 * 64 / groups) ** -0.5
    for values in [conv.kernel[...]] + ([conv.bias[...]] if use_bias else []):
        values = np.sort(np.asarray(values).ravel())
        assert -limit <= values[0] and values[-1] < limit
        uniform = np.linspace(-limit, limit, len(values))
        assert np.abs(values - uniform).max() < 4 * limit / np.sqrt(len(values))  # Kolmogorov-Smirnov


def test_bfloat16_keeps_its_dtype_and_its_statistics_are_float32() -> None:
    norm = layers.NormAct(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(jnp.ones((2, 2, 2, 4), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert norm.mean.dtype == jnp.float32
