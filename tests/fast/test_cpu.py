import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpn_jax import operations
from dpn_jax.fast import cpu


@pytest.mark.parametrize("batch_stats", [True, False])
def test_the_norms_custom_vjp_is_autodiffs(batch_stats: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    vectors = list(jax.random.uniform(jax.random.key(1), (4, 3)))  # mean, variance, scale, bias

    def loss(normalize: Callable[..., jax.Array], x: jax.Array, vectors: list[jax.Array]) -> jax.Array:
        if batch_stats:
            vectors = [x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2)), *vectors[2:]]
        return jnp.sin(normalize(x, *vectors, epsilon=1e-3, batch_stats=batch_stats)).sum()

    got, expected = (
        jax.grad(functools.partial(loss, normalize), argnums=(0, 1))(x, vectors)
        for normalize in (cpu.normalize, operations.normalize)
    )
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_the_moments_are_the_plain_ones() -> None:
    x = 5 + jax.random.normal(jax.random.key(0), (3, 5, 7, 4))
    for mine, other in zip(cpu.moments(x), operations.moments(x), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1)])
def test_the_shifted_max_pool_is_the_windowed_one(size: tuple[int, int]) -> None:
    x = jax.random.normal(jax.random.key(0), (2, *size, 3)) - 4  # negative at the border too
    np.testing.assert_array_equal(cpu.max_pool(x), operations.max_pool(x))
    assert float(cpu.max_pool(-jnp.ones((1, 4, 4, 1))).max()) == -1


def test_forking_adds_the_gradients() -> None:
    gradient = jax.grad(lambda x: jnp.sum(cpu.fork((x, 2 * x))[0][0] + 3 * cpu.fork((x, 2 * x))[1][1]))(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 7 * np.ones(3))
