"""The grouped 3x3 convolution with the groups as a CPU's vector lanes, with gradients by hand."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpn_jax.fast.cpu import Tap, noinline, pad, sum_by_product, taps
from dpn_jax.fast.grouped import Array, Native, swap_axis
from dpn_jax.operations import at_least_float32


@dataclasses.dataclass(frozen=True)
class Lanes(Native):
    """Group-minor: channels are stored `[channel of a group, group]`, so that the groups are a CPU's vector lanes.

    The convolution is then a sum of shifted products without any reduction across lanes. The other order of the
    channels costs nothing where it is folded into the kernels before and after.

    Args:
      tile: maximum rows and columns of pixels that one loop for the kernel gradient adds up.
    """

    tile: tuple[int, int] = (2, 7)

    def pack_kernel(self, kernel: Array, groups: int) -> Array:
        """See `Native.pack_kernel`; `[I, 9, O, groups]`: what one loop of `apply` reads lies together."""
        return kernel.reshape(9, kernel.shape[2], groups, -1).transpose(1, 0, 3, 2)

    def to_layout(self, array: Array, groups: int, *, axis: int = -1) -> Array:
        """See `Native.to_layout`; here `[channel of a group, group]`."""
        return swap_axis(array, groups, -1, axis)

    def from_layout(self, array: Array, groups: int, *, axis: int = -1) -> Array:
        """See `Native.from_layout`."""
        return swap_axis(array, -1, groups, axis)

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
        """See `Native.apply`."""
        if dilation > 1:
            return _on_each_grid(x, dilation, lambda x: _lanes(x, kernel, 1, self))
        return _lanes(x, kernel, stride, self)

    def forward(self, x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
        """The sum of shifted products, and the padded `[B, H + 2, W + 2, I, groups]` that it read."""
        height, width = x.shape[1:3]
        padded = pad(_by_group(x, kernel), (1, 1), (1, 1))
        return self._sum(padded, kernel, taps(height, width, stride)), padded

    def backward(self, padded: jax.Array, kernel: jax.Array, stride: int, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradients of `x` and of the kernel.

        The input gradient is the same convolution again, with the kernel flipped and its inputs and outputs swapped.
        The kernel gradient is, for each tap, a sum of products over the pixels: those of a tile in one loop, the rest
        by a product with ones.
        """
        if stride == 2:
            dx, dy = self._input_grad_stride2(padded, kernel, dy)
        else:
            dx, dy = self.forward(dy, kernel[:, ::-1].swapaxes(0, 2), 1)
        return dx, self._kernel_grad(padded, dy, stride).astype(kernel.dtype)

    def _sum(self, x: jax.Array, kernel: jax.Array, reads: tuple[Tap, ...]) -> jax.Array:
        """Sums what `reads` read of `[B, H, W, I, groups]`, times a kernel `[I, taps, O, groups]`."""
        inputs, _, outputs, groups = kernel.shape
        # a barrier, or XLA would pad again for each product, and a loop over flat channels would not be vectorized
        x = lax.optimization_barrier(x)
        total: tuple[jax.Array, ...] = ()
        for channel in range(inputs):
            total = (noinline(_add_products, channel=channel, reads=reads)(x, kernel, *total),)
        return total[0].reshape(*total[0].shape[:3], outputs * groups)

    def _input_grad_stride2(self, padded: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By phase, the parity of a pixel's row and column: each phase was read by one, two or four of the taps."""
        batch, rows, columns, _ = dy.shape
        dy = pad(_by_group(dy, kernel), (0, 1), (0, 1))
        # of a row's (or column's) parity: which row of the kernel read it, for which row of `dy`
        reads = {0: [(1, 0)], 1: [(0, 1), (2, 0)]}
        phases = []
        for parities in itertools.product(reads, repeat=2):
            pairs = list(itertools.product(*(reads[parity] for parity in parities)))
            taps_of_phase = tuple(Tap(y, x, rows, columns) for (_, y), (_, x) in pairs)
            kernel_of_phase = kernel[:, np.array([3 * y + x for (y, _), (x, _) in pairs])]
            phases.append(self._sum(dy, kernel_of_phase.swapaxes(0, 2), taps_of_phase))
        # [B, rows, columns, C] each -> [B, rows, parity, columns, parity, C]
        dx = jnp.stack([jnp.stack(phases[:2], axis=3), jnp.stack(phases[2:], axis=3)], axis=2)
        # one axis at a time, which JAX can follow on a mesh with explicit axes
        dx = dx.reshape(batch, 2 * rows, columns, 2, -1).reshape(batch, 2 * rows, 2 * columns, -1)
        return dx[:, : padded.shape[1] - 2, : padded.shape[2] - 2], dy

    def _kernel_grad(self, x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
        """Both are padded, as the other two loops read them: `x` by 1 on every side, `dy` by 1 after its end."""
        dtype = at_least_float32(x.dtype)
        border = 1 if stride == 1 else 0  # before `dy`
        sizes = [length - border - 1 for length in dy.shape[1:3]]
        tiles = tuple(-(-size // most) for size, most in zip(sizes, self.tile, strict=True))
        tile = tuple(-(-size // count) for size, count in zip(sizes, tiles, strict=True))
        # zeros after the last pixel, as many as the last tile lacks
        ends = [count * size for count, size in zip(tiles, tile, strict=True)]
        dy = _widen(dy, *(border + end for end in ends)).astype(dtype)
        x = _widen(x, *(stride * (end - 1) + 3 for end in ends)).astype(dtype)
        options = {"tiles": tiles, "tile": tile, "border": border, "stride": stride}
        # not inlined, as a loop over flat channels would not be vectorized
        rows = (noinline(_sum_products, row=row, **options)(x, dy) for row in range(3))
        return jnp.concatenate([sum_by_product(row, axes=3) for row in rows]).swapaxes(0, 1)


def _add_products(
    x: jax.Array, kernel: jax.Array, *start: jax.Array, channel: int, reads: tuple[Tap, ...]
) -> jax.Array:
    products = (tap.read(x)[:, :, :, channel, None] * kernel[channel, number] for number, tap in enumerate(reads))
    return functools.reduce(jnp.add, products, *start)


def _sum_products(
    x: jax.Array,
    dy: jax.Array,
    *,
    row: int,
    tiles: tuple[int, int],
    tile: tuple[int, int],
    border: int,
    stride: int,
) -> jax.Array:
    """`[B, *tiles, 3, I, O, groups]`: for the three taps of a kernel's row, the sums over each tile of pixels."""
    steps = [stride * size for size in tile]
    sums = []
    for column in range(3):
        products = (
            Tap(row + stride * down, column + stride * right, *tiles, *steps).read(x)[..., :, None, :]
            * Tap(border + down, border + right, *tiles, *tile).read(dy)[..., None, :, :]
            for down, right in itertools.product(*map(range, tile))
        )
        sums.append(functools.reduce(jnp.add, products))
    return jnp.stack(sums, axis=3)


def _by_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[B, H, W, C]` as `[B, H, W, C / groups, groups]`, by the groups of a kernel `[I, taps, O, groups]`."""
    return x.reshape(*x.shape[:3], -1, kernel.shape[-1])


def _on_each_grid(x: jax.Array, dilation: int, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A dilated convolution: `run`, which is not, on each grid of every so many pixels as an image of its own."""
    batch, height, width, _ = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = _widen(x, rows * dilation, columns * dilation)
    x = x.reshape(batch, rows, dilation, columns, dilation, -1).transpose(0, 2, 4, 1, 3, 5)
    y = run(x.reshape(-1, rows, columns, x.shape[-1]))
    y = y.reshape(batch, dilation, dilation, rows, columns, -1).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(batch, rows * dilation, columns * dilation, -1)[:, :height, :width]


def _widen(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zero-pads `[B, H, W, ...]` at the end, to at least `rows` x `columns`."""
    height, width = x.shape[1:3]
    return pad(x, (0, max(rows - height, 0)), (0, max(columns - width, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lanes(x: jax.Array, kernel: jax.Array, stride: int, formulation: Lanes) -> jax.Array:
    return formulation.forward(x, kernel, stride)[0]


def _lanes_forward(
    x: jax.Array, kernel: jax.Array, stride: int, formulation: Lanes
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y, padded = formulation.forward(x, kernel, stride)
    return y, (padded, kernel)


def _lanes_backward(
    stride: int, formulation: Lanes, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return formulation.backward(*residuals, stride, dy)


_lanes.defvjp(_lanes_forward, _lanes_backward)
