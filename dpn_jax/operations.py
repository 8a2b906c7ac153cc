"""What the network computes with: one frozen dataclass of functions, by default plain `jax.lax`.

Layers take it as an argument, as Flax's own layers take `conv_general_dilated=`; `dpn_jax.fast` provides alternatives
that give the same results up to rounding.

A *part* is one of several tensors that together are one feature map, split along the channels. Norms and convolutions
take a map whole or in parts, so that the residual and the dense path of a block are never concatenated just to be read.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Features = TypeVar("Features", bound=jax.Array | tuple[jax.Array, ...])
"""A feature map `[B, H, W, C]`, or a tuple of parts whose channels add up to C."""


def convolve(x: Features, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> jax.Array:
    """A 2-D convolution that pads `dilation * (kernel_size // 2)` on every side.

    Not `"SAME"`: at stride 2 and an even size that pads one pixel fewer, and only on the far side, so that every output
    sits half a stride away from where the weights were trained.

    Args:
      x: `[B, H, W, C]`; without groups also in parts: the sum of one convolution per part, on its slice of the kernel.
      kernel: `[k, k, C / groups, O]`.
      stride: step in both directions.
      dilation: pixels from one tap of the kernel to the next.
      groups: groups of channels that do not mix.

    Returns:
      `[B, H', W', O]`, sizes divided by the stride and rounded up.

    Source: `timm.layers.padding.get_padding`.
    """
    pad = dilation * (kernel.shape[0] // 2)
    if (sharding := replicated_beside(x)) and jax.typeof(kernel).sharding.mesh.empty:
        kernel = jax.sharding.reshard(kernel, sharding)  # or JAX would ask how its gradient is to be sharded
    sums = (
        lax.conv_general_dilated(
            part,
            slice_of_kernel,
            window_strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        for part, slice_of_kernel in zip(jax.tree.leaves(x), split_channels(kernel, x, axis=2), strict=True)
    )
    return functools.reduce(jnp.add, sums)


def moments(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the biased variance of each channel, `[C]` each, in two passes: `E[x^2] - E[x]^2` loses digits.

    Args:
      x: `[B, H, W, C]`.
      near: `[C]`, a guess at the mean such as the running mean, for an alternative with one pass. Its dtype is that of
        the arithmetic and the result.
    """
    x = x.astype(near.dtype)
    count = x.size // x.shape[-1]
    mean = x.sum(axis=(0, 1, 2)) / count
    return mean, jnp.square(x - mean).sum(axis=(0, 1, 2)) / count


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
    """Batch norm of one part `[B, H, W, C]`, from vectors `[C]`.

    Args:
      x: the part.
      mean, var, scale, bias: of its channels; their dtype is that of the arithmetic and the result.
      epsilon: added to the variance.
      batch_stats: whether mean and variance are those of `x` itself, for an alternative with a custom VJP.
    """
    del batch_stats
    # scaling the centered values, not shifting the scaled ones, keeps the digits where mean >> standard deviation
    return (x.astype(mean.dtype) - mean) * (scale * lax.rsqrt(var + epsilon)) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """The stem's 3x3 maximum at stride 2; pads with -inf, so that a border of negative values stays negative."""
    # the constant is numpy's: reduce_window is only differentiable where it can see that it is -inf
    return lax.reduce_window(
        x, np.asarray(-np.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )


def fork(x: Features) -> tuple[Features, Features]:
    """Returns the map twice, for two consumers; their gradients are added."""
    return x, x


@dataclasses.dataclass(frozen=True)
class Operations:
    """The functions that a network uses, each with the signature and the meaning of the default.

    Args:
      convolve: see `convolve`.
      moments: see `moments`; may have no gradient if `normalize` accounts for it.
      normalize: see `normalize`.
      max_pool: see `max_pool`.
      fork: see `fork`.
    """

    convolve: Callable[..., jax.Array] = convolve
    moments: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = moments
    normalize: Callable[..., jax.Array] = normalize
    max_pool: Callable[[jax.Array], jax.Array] = max_pool
    fork: Callable[[Features], tuple[Features, Features]] = fork


PLAIN = Operations()
"""The reference; all others match it up to rounding."""


def replicated_beside(x: Features) -> NamedSharding | None:
    """The sharding of what is the same on all devices of the mesh of `x`, such as parameters and sums over the batch.

    None where JAX finds that out by itself: without a mesh, and on one without explicit axes.
    """
    mesh = jax.typeof(jax.tree.leaves(x)[0]).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else None


def split_channels(array: jax.Array, like: Features, axis: int = -1) -> list[jax.Array]:
    """Splits `array` along `axis` at the channel boundaries of `like`'s parts."""
    parts = jax.tree.leaves(like)
    ends = np.cumsum([part.shape[-1] for part in parts[:-1]]).tolist()
    return jnp.split(array, ends, axis=axis) if ends else [array]


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """The dtype in which to accumulate sums of this dtype."""
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def check_arguments(*, rngs: object, **dtypes: object) -> None:
    """Refuses dtypes that no network computes in, by their arguments' names, and what Flax cannot draw from.

    Raises:
      ValueError: a dtype is not floating-point, or `rngs` is neither None nor `nnx.Rngs`.
    """
    for name, dtype in dtypes.items():
        try:
            is_floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            is_floating = False
        if not is_floating:
            raise ValueError(f"{name} must be a floating-point one, such as jnp.float32 or jnp.bfloat16, got {dtype!r}")
    if not isinstance(rngs, nnx.Rngs | None):
        raise ValueError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}")
