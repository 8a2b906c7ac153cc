"""The grouped 3x3 convolution, in the formulations that the backends run well.

With few channels per group (3 in DPN-92's first stage) a grouped convolution starves matrix units and, in XLA, vector
units alike: what it costs is decided by how it is written. Each formulation
packs a kernel once and applies it (`dpn_jax.fast.lanes` has a CPU's); what it measured is in docs/performance.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpn_jax.operations import convolve

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Native:
    """XLA's own grouped convolution."""

    def pack_kernel(self, kernel: Array, groups: int) -> Array:
        """The kernel as `apply` wants it, from `[3, 3, I, O]` (I channels a group)."""
        return kernel

    def to_layout(self, array: Array, groups: int, *, axis: int = -1) -> Array:
        """Puts channels into the order in which `apply` reads and returns them; the usual one is group by group."""
        return array

    def from_layout(self, array: Array, groups: int, *, axis: int = -1) -> Array:
        """The way back from `to_layout`."""
        return array

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', C']`; one of stride and dilation is 1."""
        return convolve(x, kernel, stride=stride, dilation=dilation, groups=x.shape[-1] // kernel.shape[2])


@dataclasses.dataclass(frozen=True)
class Merged(Native):
    """Several groups as one, with a block-diagonal kernel: more arithmetic, in pieces that fill a matrix unit.

    Args:
      width: fewest input channels of a merged group.
      sliced: one convolution for each merged group, on a slice of the channels, instead of a grouped one. On TPU a
        grouped one moves the channels away from the lanes and back.
    """

    width: int = 32
    sliced: bool = False

    def pack_kernel(self, kernel: Array, groups: int) -> Array:
        """See `Native.pack_kernel`; `[3, 3, I * merged, O]`."""
        per_group, outputs = kernel.shape[2], kernel.shape[3] // groups
        merged = _merge(groups, per_group, self.width)
        if merged == 1:
            return kernel
        xp = jnp if isinstance(kernel, jax.Array) else np
        kernel = kernel.reshape(*kernel.shape[:2], per_group, groups // merged, merged, outputs)
        diagonal = xp.eye(merged, dtype=kernel.dtype)
        # [y, x, i, group, which, o] * (which == from) -> [y, x, from, i, group, which, o]
        kernel = kernel[:, :, None] * diagonal[:, None, None, :, None]
        return kernel.reshape(*kernel.shape[:2], merged * per_group, groups * outputs)

    def apply(self, x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
        """See `Native.apply`."""
        width = kernel.shape[2]
        groups = x.shape[-1] // width
        if not self.sliced or groups == 1:
            return super().apply(x, kernel, stride=stride, dilation=dilation)
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        return jnp.concatenate([convolve(part, k, stride=stride, dilation=dilation) for part, k in parts], axis=-1)


def _merge(groups: int, channels: int, width: int) -> int:
    """The fewest groups of `channels` each that have `width` channels together; or all groups, if they have fewer."""
    return next((n for n in range(1, groups) if groups % n == 0 and n * channels >= width), groups)


def swap_axis(array: Array, first: int, second: int, axis: int) -> Array:
    """Transposes an axis that is `first` x `second` long, as if it were two; one of the lengths may be -1."""
    axis %= array.ndim
    split = array.reshape(*array.shape[:axis], first, second, *array.shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(array.shape)


@functools.partial(jax.jit, static_argnames=("groups", "stride", "formulation"))
def grouped_conv(
    x: jax.Array, kernel: jax.Array, *, groups: int, stride: int = 1, formulation: Native = Native()
) -> jax.Array:
    """A grouped 3x3 convolution with one pixel of padding, as ResNeXt, RegNet and DPN have it.

    Differentiable in both arguments (`Lanes` in reverse mode only); the gradient reaches only the kernel's real
    entries.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[3, 3, C / groups, O]`.
      groups: groups of channels that do not mix.
      stride: 1 or 2.
      formulation: `Native()`, `Merged(width=32)` or `lanes.Lanes()`. All give the same, up to rounding.

    Returns:
      `[B, H / stride, W / stride, O]`, sizes rounded up, of the dtype of `x`.

    Raises:
      ValueError: the shapes do not fit, or another stride.

    Example:
      >>> import jax.numpy as jnp
      >>> x, kernel = jnp.ones((1, 8, 8, 96)), jnp.ones((3, 3, 3, 96))
      >>> plain = grouped_conv(x, kernel, groups=32)
      >>> bool(jnp.allclose(plain, grouped_conv(x, kernel, groups=32, formulation=Merged(32))))
      True

    Source: paper Section 4.2 (the grouped middle layer); `torch.nn.functional.conv2d(groups=)`.
    """
    if x.ndim != 4 or kernel.shape[:2] != (3, 3) or kernel.shape[2] * groups != x.shape[-1] or kernel.shape[3] % groups:
        raise ValueError(f"x {x.shape} and kernel {kernel.shape} do not fit a 3x3 convolution of {groups} groups")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    x = formulation.to_layout(x, groups)
    return formulation.from_layout(formulation.apply(x, formulation.pack_kernel(kernel, groups), stride=stride), groups)
