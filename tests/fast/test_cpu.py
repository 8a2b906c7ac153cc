import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpn_jax import operations
from dpn_jax.fast import cpu


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1)])
def test_the_shifted_max_pool_is_the_windowed_one(size: tuple[int, int]) -> None:
    x = jax.random.normal(jax.random.key(0), (2, *size, 3)) - 4  # negative at the border too
    np.testing.assert_array_equal(cpu.max_pool(x), operations.max_pool(x))
    assert float(cpu.max_pool(-jnp.ones((1, 4, 4, 1))).max()) == -1


def test_forking_adds_the_gradients() -> None:
    gradient = jax.grad(lambda x: jnp.sum(cpu.fork((x, 2 * x))[0][0] + 3 * cpu.fork((x, 2 * x))[1][1]))(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 7 * np.ones(3))
