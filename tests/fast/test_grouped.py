from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpn_jax.fast import cpu
from dpn_jax.fast.grouped import Merged, Native, grouped_conv
from dpn_jax.fast.lanes import Lanes
from dpn_jax.operations import convolve

FORMULATIONS = [Merged(8), Merged(32), Merged(10**6), Merged(64, sliced=True), Lanes()]
CASES = [(48, 96, 16, 2), (48, 24, 4, 1), (40, 40, 10, 2)]


@pytest.mark.parametrize(("inputs", "outputs", "groups", "stride"), CASES)
@pytest.mark.parametrize("formulation", FORMULATIONS, ids=str)
def test_formulations_agree_with_xlas_own(
    formulation: Native, inputs: int, outputs: int, groups: int, stride: int
) -> None:
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 7, 10, inputs), "float64")
        kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs // groups, outputs), "float64")
        options = {"groups": groups, "stride": stride}
        expected = grouped_conv(x, kernel, **options)
        assert expected.shape == (2, -(-7 // stride), -(-10 // stride), outputs)
        got = grouped_conv(x, kernel, **options, formulation=formulation)
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("formulation", [Merged(16), Lanes(), Lanes(tile=(3, 5))], ids=str)
def test_gradients_agree_and_reach_only_real_entries(formulation: Native, stride: int) -> None:
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 6, 17, 32), "float64")
        kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 16), "float64")

        def loss(x: jax.Array, kernel: jax.Array, formulation: Native) -> jax.Array:
            return jnp.sin(grouped_conv(x, kernel, groups=8, stride=stride, formulation=formulation)).sum()

        expected = jax.grad(loss, argnums=(0, 1))(x, kernel, Native())
        got = jax.grad(loss, argnums=(0, 1))(x, kernel, formulation)
        for ours, plain in zip(got, expected, strict=True):
            assert ours.shape == plain.shape
            np.testing.assert_allclose(ours, plain, atol=1e-11)


@pytest.mark.parametrize(
    ("height", "inputs", "outputs", "size", "stride"),
    # many rows, whichever side is wider; an odd number of rows, and few; the stem
    [(6, 5, 8, 1, 1), (6, 8, 5, 1, 1), (5, 8, 3, 1, 1), (2, 24, 40, 1, 1), (6, 3, 4, 7, 2)],
)
def test_the_product_and_its_gradients_are_the_convolutions(
    height: int, inputs: int, outputs: int, size: int, stride: int
) -> None:
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (3, height, 7, inputs), "float64")
        kernel = jax.random.normal(jax.random.key(1), (size, size, inputs, outputs), "float64")

        def loss(x: jax.Array, kernel: jax.Array, convolve: Callable[..., jax.Array]) -> jax.Array:
            return jnp.sin(convolve(x, kernel, stride=stride)).sum()

        expected = jax.value_and_grad(loss, argnums=(0, 1))(x, kernel, convolve)
        got = jax.value_and_grad(loss, argnums=(0, 1))(x, kernel, cpu.convolve)
        jax.tree.map(lambda ours, plain: np.testing.assert_allclose(ours, plain, atol=1e-11), got, expected)


def test_merged_kernels_are_block_diagonal() -> None:
    kernel = np.arange(1, 3 * 3 * 2 * 8 + 1, dtype=np.float32).reshape(3, 3, 2, 8)
    merged = Merged(4).pack_kernel(kernel, groups=4)  # two groups of 2 channels become one of 4
    assert merged.shape == (3, 3, 4, 8)
    for output in range(8):
        first = 2 * (output // 2 % 2)
        np.testing.assert_array_equal(merged[:, :, first : first + 2, output], kernel[:, :, :, output])
    assert np.count_nonzero(merged) == kernel.size


def test_arranging_gives_the_same_for_numpy_and_jax() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 24)).astype(np.float32)
    for formulation in FORMULATIONS:
        np.testing.assert_array_equal(
            formulation.pack_kernel(kernel, 8), np.asarray(formulation.pack_kernel(jnp.asarray(kernel), 8))
        )


@pytest.mark.parametrize(
    ("x", "kernel", "groups"),
    [
        ((1, 8, 8, 12), (3, 3, 4, 12), 4),
        ((1, 8, 8, 12), (3, 3, 3, 10), 4),
        ((8, 8, 12), (3, 3, 3, 12), 4),
        ((1, 8, 8, 12), (5, 5, 3, 12), 4),
    ],
)
def test_shapes_that_do_not_fit(x: tuple[int, ...], kernel: tuple[int, ...], groups: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        grouped_conv(jnp.zeros(x), jnp.zeros(kernel), groups=groups)


def test_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        grouped_conv(jnp.zeros((1, 8, 8, 12)), jnp.zeros((3, 3, 3, 12)), groups=4, stride=3)
