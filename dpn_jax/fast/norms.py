"""Batch norm with a custom VJP: two sums over the pixels, where autodiff takes five."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Vectors = tuple[jax.Array, ...]


class How(NamedTuple):
    """What a backend computes a norm with."""

    channel_sum: Callable[[jax.Array], jax.Array]
    """Sums `[B, H, W, C]` over all but the channels."""
    call: Callable[..., Callable[..., Vectors]] = functools.partial
    """Binds options to a function of vectors, and decides how it is called."""
    keep: Callable[[jax.Array], jax.Array] = jnp.asarray
    """What is kept of `x` for the gradient, and normalized."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normalize(how: How, epsilon: float, batch_stats: bool, x: jax.Array, *vectors: jax.Array) -> jax.Array:
    """`operations.normalize`, computed as `how` says.

    Args:
      how: what a backend computes with.
      epsilon: added to the variance.
      batch_stats: whether mean and variance are those of `x` itself. Then all of the gradient goes to `x`, and none to
        them.
      x: `[B, H, W, C]`, kept for the gradient in its own dtype.
      vectors: mean, variance, scale and bias, `[C]`; their dtype is that of the arithmetic and the result.
    """
    return _forward(how, epsilon, batch_stats, x, *vectors)[0]


def _forward(
    how: How, epsilon: float, batch_stats: bool, x: jax.Array, *vectors: jax.Array
) -> tuple[jax.Array, Vectors]:
    mean, bias, scale, inverse_std, gain = how.call(_forward_vectors, epsilon=epsilon)(*vectors)
    x = how.keep(x)
    return (x.astype(mean.dtype) - mean) * gain + bias, (x, mean, scale, inverse_std, gain)


def _backward(how: How, epsilon: float, batch_stats: bool, residuals: Vectors, dy: jax.Array) -> Vectors:
    x, mean, scale, inverse_std, gain = residuals
    centered = x.astype(mean.dtype) - mean
    dbias = how.channel_sum(dy)
    dgain = how.channel_sum(dy * centered)
    vectors = how.call(_backward_vectors, count=x.size // x.shape[-1])(dbias, dgain, scale, inverse_std)
    dmean, dvar, constant, slope, dscale, dbias = vectors
    dx = dy * gain
    if batch_stats:
        dx = dx + (constant + centered * slope)
        dmean, dvar = jnp.zeros_like(mean), jnp.zeros_like(mean)
    return dx.astype(x.dtype), dmean, dvar, dscale, dbias


def _forward_vectors(mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> Vectors:
    inverse_std = lax.rsqrt(var + epsilon)
    return mean, bias, scale, inverse_std, scale * inverse_std


def _backward_vectors(
    dbias: jax.Array, dgain: jax.Array, scale: jax.Array, inverse_std: jax.Array, *, count: int
) -> Vectors:
    dmean = -dbias * scale * inverse_std
    dvar = dgain * scale * -0.5 * inverse_std**3
    return dmean, dvar, dmean / count, dvar * (2 / count), dgain * inverse_std, dbias


normalize.defvjp(_forward, _backward)
