"""The norms that backends compute in their own ways are the plain one."""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpn_jax import operations
from dpn_jax.fast import cpu, tpu

both = pytest.mark.parametrize("backend", [cpu, tpu], ids=["cpu", "tpu"])


@both
@pytest.mark.parametrize("batch_stats", [True, False])
def test_the_custom_vjp_is_autodiffs(backend: ModuleType, batch_stats: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    vectors = list(jax.random.uniform(jax.random.key(1), (4, 3)))  # mean, variance, scale, bias

    def loss(normalize: Callable[..., jax.Array], x: jax.Array, vectors: list[jax.Array]) -> jax.Array:
        if batch_stats:
            vectors = [x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)), *vectors[2:]]
        return jnp.sin(normalize(x, *vectors, epsilon=1e-3, batch_stats=batch_stats)).sum()

    got, expected = (
        jax.grad(functools.partial(loss, normalize), argnums=(0, 1))(x, vectors)
        for normalize in (backend.normalize, operations.normalize)
    )
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@both
def test_bfloat16_is_normalized_in_float32_and_its_gradient_comes_back_in_bfloat16(backend: ModuleType) -> None:
    x = (3 + jax.random.normal(jax.random.key(0), (2, 5, 7, 3))).astype(jnp.bfloat16)
    mean, var = backend.moments(x, jnp.full(3, 3.0))
    assert mean.dtype == var.dtype == jnp.float32
    run = functools.partial(backend.normalize, epsilon=1e-3, batch_stats=True)
    y, vjp = jax.vjp(lambda x: run(x, mean, var, jnp.ones(3), jnp.zeros(3)), x)
    assert y.dtype == jnp.float32 and vjp(y)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(axis=(0, 1, 2)), 1, atol=2e-3)


@both
@pytest.mark.parametrize("away", [0, 10, 100])
def test_the_moments_are_the_plain_ones(backend: ModuleType, away: float) -> None:
    x = 1000 + jax.random.normal(jax.random.key(0), (3, 5, 7, 4))  # one pass around 0 would give a variance of 0 to 2
    near = jnp.full(4, 1000.0 - away)
    for mine, other in zip(backend.moments(x, near), operations.moments(x, near), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-2 if away == 100 else 1e-4)


def test_one_pass_far_from_the_mean_gives_no_negative_variance() -> None:
    x = 1e4 * jax.random.normal(jax.random.key(0), (64,)) + jnp.zeros((1, 3, 3, 1))  # constant: the variance is 0
    assert tpu.moments(x, jnp.zeros(64))[1].min() >= 0
