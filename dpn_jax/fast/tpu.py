"""TPU-only operations, for training: a step there is bound by memory, so what counts is how often a map is read.

What each choice measured is in docs/performance.md.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dpn_jax.fast import norms


def moments(x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`operations.moments` in one pass, which XLA fuses with what computes `x`; without a gradient.

    The sums are of what `x` differs from `near`, so that they lose no digits in `E[x^2] - E[x]^2` unless the mean is
    many standard deviations away from it.
    """
    shifted = lax.stop_gradient(x).astype(near.dtype) - near
    count = x.size // x.shape[-1]
    mean, square = _channel_sum(shifted) / count, _channel_sum(jnp.square(shifted)) / count
    return near + mean, jnp.maximum(square - jnp.square(mean), 0)


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
    """`operations.normalize` with a custom VJP."""
    # the barrier: XLA would write what a convolution gives to memory in float32 too, and keep that for the gradient
    how = norms.How(_channel_sum, keep=lax.optimization_barrier)
    return norms.normalize(how, epsilon, batch_stats, x, mean, var, scale, bias)


def _channel_sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=(0, 1, 2))
