"""CPU-only operations: calls that are not inlined, sums and convolutions as matrix products, gradients by hand.

What each choice measured is in docs/performance.md.
"""

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from dpn_jax.fast import norms
from dpn_jax.operations import Features, replicated_beside

T = TypeVar("T")


class Tap(NamedTuple):
    """The pixels that one tap of a kernel reads: a strided window of rows and columns that starts at (y, x)."""

    y: int
    x: int
    rows: int
    columns: int
    row_stride: int = 1
    column_stride: int = 1

    def read(self, image: jax.Array) -> jax.Array:
        """Reads them from `[B, H, W, ...]`."""
        rows = slice(self.y, self.y + self.rows * self.row_stride, self.row_stride)
        columns = slice(self.x, self.x + self.columns * self.column_stride, self.column_stride)
        return image[:, rows, columns]


def taps(height: int, width: int, stride: int, *, size: int = 3) -> tuple[Tap, ...]:
    """What each tap of a `size` x `size` kernel reads of an image padded by `size // 2`."""
    rows, columns = (-(-length // stride) for length in (height, width))
    return tuple(Tap(y, x, rows, columns, stride, stride) for y in range(size) for x in range(size))


def pad(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Zero-pads the rows and the columns of `[B, H, W, ...]`."""
    return jnp.pad(x, [(0, 0), rows, columns, *[(0, 0)] * (x.ndim - 3)])


def noinline(function: Callable[..., T], **options: Hashable) -> Callable[..., T]:
    """A function whose operations XLA's CPU compiler fuses with no others: there, it is a call that is not inlined.

    Args:
      function: of arrays and `options`. At a module's top level it is traced only once for equal shapes and options.
        It must not sum over the batch, which may be split over devices: XLA keeps collectives in order within one
        computation only. Those in a call meet the others in another order on each device, and hang forever or, between
        processes, get each other's numbers.
      options: its keyword arguments.
    """
    run = _jitted(function, tuple(options.items()))

    def call(*arguments: jax.Array) -> T:
        with set_xla_metadata(inlineable="false"):
            return run(*arguments)

    return lambda *arguments: lax.platform_dependent(*arguments, cpu=call, default=run)


@functools.lru_cache(maxsize=4096)
def _jitted(function: Callable[..., T], options: tuple[tuple[str, Hashable], ...]) -> Callable[..., T]:
    return jax.jit(functools.partial(function, **dict(options)))


# Convolutions as products


def convolve(x: Features, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """`operations.convolve` without groups, as a product of patches with a matrix.

    XLA runs that faster on a CPU where the kernel is 1x1 or, for the stem, differentiated. Parts are concatenated into
    one product: a sum of two would be recomputed in every consumer's loop.
    """
    x = jnp.concatenate(jax.tree.leaves(x), axis=-1)
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    x = pad(x, (size // 2, size // 2), (size // 2, size // 2))
    x = jnp.concatenate([tap.read(x) for tap in taps(height, width, stride, size=size)], axis=-1)
    y = _product(x.reshape(-1, x.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` of many rows, with a gradient of the matrix that runs on all cores."""
    return x @ matrix


def _product_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ matrix, (x, matrix)


def _product_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = residuals
    # not inlined, or `x` would be computed once for the product and once more for its halves
    kernel_grad = noinline(_kernel_grad) if _one_cpu_device() else _kernel_grad
    return dy @ matrix.T, kernel_grad(x, dy)


def _kernel_grad(x: jax.Array, dy: jax.Array) -> jax.Array:
    """`x.T @ dy`. The narrower factor comes first and, where there are many rows, in halves that run in parallel."""
    rows, widest = len(x), max(x.shape[1], dy.shape[1])
    if x.shape[1] > dy.shape[1]:
        return _kernel_grad(dy, x).T
    sharding = replicated_beside(x)
    parts = 2 if sharding is None and rows % 2 == 0 and rows >= 3 * widest else 1
    x, dy = (factor.reshape(parts, rows // parts, -1) for factor in (x, dy))
    return lax.dot_general(x, dy, (((1,), (1,)), ((0,), (0,))), out_sharding=sharding).sum(axis=0)


_product.defvjp(_product_forward, _product_backward)


def _one_cpu_device() -> bool:
    """Whether no array on a CPU can be split over devices, so that a call may sum over the batch (see `noinline`)."""
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # the CPU backend is disabled
        return True


# Norms


def moments(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`operations.moments` by products; without a gradient, as `normalize` knows how they depend on `x`."""
    x = lax.stop_gradient(x).astype(near.dtype)
    count = x.size // x.shape[-1]
    mean = _channel_sum(x) / count
    return mean, _channel_sum(jnp.square(x - mean)) / count


def normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    batch_stats: bool,
) -> jax.Array:
    """`operations.normalize` with a custom VJP.

    Vectors are computed in a call that is not inlined, not once more for each pixel.
    """
    how = norms.How(_channel_sum, call=noinline)
    return norms.normalize(how, epsilon, batch_stats, x, mean, var, scale, bias)


def _channel_sum(x: jax.Array) -> jax.Array:
    """Sums `[B, H, W, C]` over all but the channels: up to eight pixels in one loop, the rest by a product with ones.

    Up to 20 times as fast as XLA's own sum, which goes through a matrix's columns one by one.
    """
    batch, height, width, channels = x.shape
    # few enough to be written out: fused with what computes `x`, which is then never in memory as a whole
    tile = next(n for n in range(8, 0, -1) if height * width % n == 0)
    # in two steps, which JAX can follow on a mesh with explicit axes
    pixels = x.reshape(batch, -1, channels).reshape(batch, -1, tile, channels)
    sums = functools.reduce(jnp.add, (pixels[:, :, pixel] for pixel in range(tile)))
    return sum_by_product(sums, axes=2)


def sum_by_product(x: jax.Array, *, axes: int) -> jax.Array:
    """Sums over the first `axes` axes, as a product with ones: XLA's CPU compiler sums columns one by one."""
    summed = tuple(range(axes))
    ones = jnp.ones_like(x[(..., *[0] * (x.ndim - axes))])  # sharded as `x` is
    contracted = ((summed, summed), ((), ()))
    return lax.dot_general(ones, x, contracted, precision="highest", out_sharding=replicated_beside(x))


# The rest


def max_pool(x: jax.Array) -> jax.Array:
    """`operations.max_pool` as the maximum of nine shifted maps: one loop, where reduce_window on a CPU is many."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return functools.reduce(jnp.maximum, (tap.read(x) for tap in taps(height, width, 2)))


def fork(x: Features) -> tuple[Features, Features]:
    """`operations.fork`, whose gradients are added where XLA's CPU compiler cannot fuse the sum.

    Otherwise it computes the gradient of the residual path anew in each block, from those of all later blocks.
    """
    return _fork(x)  # objects with a custom VJP can be neither copied nor pickled, so operations are functions


@jax.custom_vjp
def _fork(x: Features) -> tuple[Features, Features]:
    return x, x


def _fork_forward(x: Features) -> tuple[tuple[Features, Features], None]:
    return (x, x), None


def _fork_backward(_: None, gradients: tuple[Features, Features]) -> tuple[Features]:
    return (noinline(_add_trees)(*gradients),)


def _add_trees(x: Features, y: Features) -> Features:
    return jax.tree.map(jnp.add, x, y)


_fork.defvjp(_fork_forward, _fork_backward)
