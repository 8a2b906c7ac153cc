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


class Kept(NamedTuple):
    """What the gradient of a norm needs."""

    x: jax.Array
    mean: jax.Array
    scale: jax.Array
    inverse_std: jax.Array
    gain: jax.Array

    @property
    def centered(self) -> jax.Array:
        """What `x` differs from the mean."""
        return self.x.astype(self.mean.dtype) - self.mean


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
    return forward(how, epsilon, batch_stats, x, *vectors)[0]


def forward(how: How, epsilon: float, batch_stats: bool, x: jax.Array, *vectors: jax.Array) -> tuple[jax.Array, Kept]:
    """`normalize`, and what its gradient needs."""
    mean, bias, scale, inverse_std, gain = how.call(_forward_vectors, epsilon=epsilon)(*vectors)
    x = how.keep(x)
    return (x.astype(mean.dtype) - mean) * gain + bias, Kept(x, mean, scale, inverse_std, gain)


def backward_vectors(how: How, kept: Kept, dy: jax.Array) -> Vectors:
    """The first half of the gradient, two sums over the pixels.

    Returns:
      The gradients of mean, variance, scale and bias; and, where the first two are of `x` itself, what they add to its
      gradient: a constant, and a multiple of what `x` differs from the mean.
    """
    dbias = how.channel_sum(dy)
    dgain = how.channel_sum(dy * kept.centered)
    count = kept.x.size // kept.x.shape[-1]
    return how.call(_backward_vectors, count=count)(dbias, dgain, kept.scale, kept.inverse_std)


def backward_input(kept: Kept, dy: jax.Array, constant: jax.Array, slope: jax.Array) -> jax.Array:
    """The second half: the gradient of `x`, from the sums over all of it."""
    return (dy * kept.gain + (constant + kept.centered * slope)).astype(kept.x.dtype)


def of_batch(dmean: jax.Array, dvar: jax.Array, dscale: jax.Array, dbias: jax.Array) -> Vectors:
    """The gradients of the vectors where mean and variance are of `x` itself, to which all of theirs goes."""
    return jnp.zeros_like(dmean), jnp.zeros_like(dvar), dscale, dbias


def _backward(how: How, epsilon: float, batch_stats: bool, kept: Kept, dy: jax.Array) -> Vectors:
    *dvectors, constant, slope = backward_vectors(how, kept, dy)
    if not batch_stats:
        return (dy * kept.gain).astype(kept.x.dtype), *dvectors
    return backward_input(kept, dy, constant, slope), *of_batch(*dvectors)


def _forward_vectors(mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> Vectors:
    inverse_std = lax.rsqrt(var + epsilon)
    return mean, bias, scale, inverse_std, scale * inverse_std


def _backward_vectors(
    dbias: jax.Array, dgain: jax.Array, scale: jax.Array, inverse_std: jax.Array, *, count: int
) -> Vectors:
    dmean = -dbias * scale * inverse_std
    dvar = dgain * scale * -0.5 * inverse_std**3
    return dmean, dvar, dgain * inverse_std, dbias, dmean / count, dvar * (2 / count)


normalize.defvjp(forward, _backward)
