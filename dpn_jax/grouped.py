"""The grouped 3x3 convolution, in the formulations that the backends run well.

With few channels a group (3 in DPN-92's first stage) a grouped convolution starves matrix units and, in XLA, vector
units alike: what it costs is decided by how it is written. Each formulation arranges a kernel once and applies it;
what it measured is in docs/performance.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Native:
    """XLA's own grouped convolution."""

    def arrange(self, kernel: Array, groups: int) -> Array:
        """The kernel as `apply` wants it, from `[3, 3, I, O]` (I channels a group)."""
        return kernel

    def order(self, channels: int, groups: int) -> np.ndarray | None:
        """The order in which `apply` wants and gives channels; None for the usual one, group by group."""
        return None

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', C']`."""
        return convolve(x, kernel, stride=stride, groups=x.shape[-1] // kernel.shape[2])


@dataclasses.dataclass(frozen=True)
class Merged(Native):
    """Several groups as one, with a block-diagonal kernel: more arithmetic, in pieces that fill a matrix unit.

    Args:
      width: fewest input channels of a merged group.
      sliced: one convolution for each merged group, on a slice of the channels, instead of a grouped one. On TPU the
        latter moves the channels away from the lanes and back.
    """

    width: int = 32
    sliced: bool = False

    def arrange(self, kernel: Array, groups: int) -> Array:
        """See `Native.arrange`; `[3, 3, I * merged, O]`."""
        per_group, outputs = kernel.shape[2], kernel.shape[3] // groups
        merged = next((n for n in range(1, groups) if groups % n == 0 and n * per_group >= self.width), groups)
        if merged == 1:
            return kernel
        numpy = jnp if isinstance(kernel, jax.Array) else np
        kernel = kernel.reshape(*kernel.shape[:2], per_group, groups // merged, merged, outputs)
        diagonal = numpy.eye(merged, dtype=kernel.dtype)
        # [y, x, i, group, which, o] * (which == from) -> [y, x, from, i, group, which, o]
        kernel = kernel[:, :, None] * diagonal[:, None, None, :, None]
        return kernel.reshape(*kernel.shape[:2], merged * per_group, groups * outputs)

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
        """See `Native.apply`."""
        width = kernel.shape[2]
        groups = x.shape[-1] // width
        if not self.sliced or groups == 1:
            return super().apply(x, kernel, stride=stride)
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        return jnp.concatenate([convolve(part, k, stride=stride) for part, k in parts], axis=-1)


@dataclasses.dataclass(frozen=True)
class Lanes(Native):
    """Group-minor: channels are stored `[channel of a group, group]`, so that the groups are a CPU's vector lanes.

    The convolution is then a sum of shifted products without any reduction across lanes. The other order of the
    channels costs nothing where it is folded into the kernels before and after.

    Args:
      unroll: most channels a group for which the sum is written out, in one loop for each output channel of a group.
        Above it, about 100 products in a loop, compiling takes a minute and the result is slower.
      chunk: above it, input channels of a group that one loop adds to all the outputs.
    """

    unroll: int = 6
    chunk: int = 2

    def arrange(self, kernel: Array, groups: int) -> Array:
        """See `Native.arrange`; `[9, I, O, groups]`."""
        return kernel.reshape(9, kernel.shape[2], groups, -1).swapaxes(2, 3)

    def order(self, channels: int, groups: int) -> np.ndarray:
        """See `Native.order`."""
        return np.arange(channels).reshape(groups, -1).T.ravel()

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
        """See `Native.apply`."""
        _, inputs, outputs, groups = kernel.shape
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, inputs, groups)
        # XLA would otherwise pad again for each product
        x = lax.optimization_barrier(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0))))
        taps = [
            (slice(None), slice(y, y + height, stride), slice(x, x + width, stride)) for y in range(3) for x in range(3)
        ]

        def total(x: jax.Array, kernel: jax.Array, start: jax.Array | None = None) -> jax.Array:
            products = (
                x[tap][:, :, :, channel, ..., :] * kernel[number, channel]
                for channel in range(kernel.shape[1])
                for number, tap in enumerate(taps)
            )
            return functools.reduce(jnp.add, products) if start is None else functools.reduce(jnp.add, products, start)

        if inputs <= self.unroll:
            y = jnp.stack([total(x, kernel[:, :, output]) for output in range(outputs)], axis=3)
        else:
            chunk = next(n for n in range(self.chunk, 0, -1) if inputs % n == 0)

            def add(index: jax.Array, y: jax.Array) -> jax.Array:
                part = lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis=3)
                factors = lax.dynamic_slice_in_dim(kernel, index * chunk, chunk, axis=1)
                return total(part[:, :, :, :, None], factors, y)

            start = jnp.zeros((batch, -(-height // stride), -(-width // stride), outputs, groups), x.dtype)
            y = lax.fori_loop(0, inputs // chunk, add, start)
        # a loop over the flat channels would not be vectorised: only the finished sums are reshaped
        y = lax.optimization_barrier(y)
        return y.reshape(*y.shape[:3], outputs * groups)


Formulation = Native | Merged | Lanes


@functools.partial(jax.jit, static_argnames=("groups", "stride", "formulation"))
def grouped_conv(
    x: jax.Array, kernel: jax.Array, *, groups: int, stride: int = 1, formulation: Formulation = Native()
) -> jax.Array:
    """A grouped 3x3 convolution with one pixel of padding, as ResNeXt, RegNet and DPN have it, written one way or
    another.

    Differentiable in both arguments; the gradient reaches only the kernel's real entries.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[3, 3, C / groups, O]`.
      groups: groups of channels that do not mix.
      stride: 1 or 2.
      formulation: `Native()`, `Merged(width=32)` or `Lanes()`. All give the same, up to rounding.

    Returns:
      `[B, H / stride, W / stride, O]`, sizes rounded up, of the dtype of `x`.

    Raises:
      ValueError: the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((1, 8, 8, 96)), jnp.ones((3, 3, 3, 96))
      >>> plain = grouped_conv(x, kernel, groups=32)
      >>> bool(jnp.allclose(plain, grouped_conv(x, kernel, groups=32, formulation=Lanes())))
      True

    Source: paper Section 3.3 (the grouped middle layer); `torch.nn.functional.conv2d(groups=)`.
    """
    if x.ndim != 4 or kernel.shape[:2] != (3, 3) or kernel.shape[2] * groups != x.shape[-1] or kernel.shape[3] % groups:
        raise ValueError(f"x {x.shape} and kernel {kernel.shape} do not fit a 3x3 convolution of {groups} groups")
    before, after = formulation.order(x.shape[-1], groups), formulation.order(kernel.shape[-1], groups)
    x = x if before is None else x[..., before]
    y = formulation.apply(x, formulation.arrange(kernel, groups), stride=stride)
    return y if after is None else y[..., np.argsort(after)]


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, groups: int = 1) -> jax.Array:
    """A 2-D convolution of `[B, H, W, C]` with `[h, w, C / groups, O]` that pads `h // 2` on every side.

    Not `"SAME"`: at stride 2 and an even size that pads one pixel less, and only on the far side, so that every output
    sits half a stride away from where the weights were trained.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
