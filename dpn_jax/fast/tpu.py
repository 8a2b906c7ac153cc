"""TPU-only operations, for training: a step there is bound by memory, so what counts is how often a map is read.

What each choice measured is in docs/performance.md.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dpn_jax.fast import norms
from dpn_jax.layers import ACTIVATIONS, NormActConv
from dpn_jax.operations import Features

Maps = tuple[jax.Array, ...]
"""The parts of a feature map."""
After = Callable[[Maps, jax.Array], jax.Array]
"""What follows a norm: a function of what it gives, and of a kernel."""


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
    how = _SUMS._replace(keep=lax.optimization_barrier)
    return norms.normalize(how, epsilon, batch_stats, x, mean, var, scale, bias)


class Recomputed(nnx.Module):
    """Norm, activation and 1x1 convolution in training, where what the convolution passes back is not stored.

    That is as large as what the norm has read, and the norm's gradient waits for two sums over all of it. Where the
    convolution writes far fewer channels, less is moved by computing it twice, once for the sums and once for the
    gradient, than by writing it and reading it again.

    Args:
      unit: whose parameters are used.
    """

    def __init__(self, unit: NormActConv) -> None:
        self.norm, self.conv = unit.norm, unit.conv

    def __call__(self, x: Features) -> jax.Array:
        """What the unit gives."""
        norm, conv = self.norm, self.conv
        if norm.use_running_average:  # the gradient waits for nothing
            return conv(norm(x))

        def after(normalized: Maps, kernel: jax.Array) -> jax.Array:
            activated = (ACTIVATIONS[norm.activation](part).astype(norm.dtype) for part in normalized)
            return conv.operations.convolve(tuple(activated), kernel)

        parts, kernel = tuple(jax.tree.leaves(x)), conv.kernel[...].astype(conv.dtype)
        return _recomputed(after, norm.epsilon, parts, kernel, norm.vectors(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(
    after: After, epsilon: float, parts: Maps, kernel: jax.Array, vectors: list[norms.Vectors]
) -> jax.Array:
    return _forward(after, epsilon, parts, kernel, vectors)[0]


def _forward(
    after: After, epsilon: float, parts: Maps, kernel: jax.Array, vectors: list[norms.Vectors]
) -> tuple[jax.Array, tuple[Maps, jax.Array, list[norms.Vectors]]]:
    parts = tuple(map(lax.optimization_barrier, parts))  # as in `normalize`
    normalized, _ = _normalized(epsilon, parts, vectors)
    return after(normalized, kernel), (parts, kernel, vectors)


def _backward(
    after: After, epsilon: float, residuals: tuple[Maps, jax.Array, list[norms.Vectors]], dy: jax.Array
) -> tuple[Maps, jax.Array, list[norms.Vectors]]:
    parts, kernel, vectors = residuals

    def gradients(parts: Maps, dy: jax.Array) -> tuple[list[tuple[norms.Kept, jax.Array]], jax.Array]:
        normalized, kept = _normalized(epsilon, parts, vectors)
        passed, dkernel = jax.vjp(after, normalized, kernel)[1](dy)
        return list(zip(kept, passed, strict=True)), dkernel

    of_parts, dkernel = gradients(parts, dy)
    found = [norms.backward_vectors(_SUMS, *of_part) for of_part in of_parts]
    # the barrier: XLA would see that it has computed this already, and store it
    parts, dy, found = lax.optimization_barrier((parts, dy, found))
    of_parts, _ = gradients(parts, dy)
    dx = (norms.backward_input(*of_part, *sums[-2:]) for of_part, sums in zip(of_parts, found, strict=True))
    return tuple(dx), dkernel, [norms.of_batch(*sums[:-2]) for sums in found]


_recomputed.defvjp(_forward, _backward)


def _normalized(epsilon: float, parts: Maps, vectors: list[norms.Vectors]) -> tuple[Maps, tuple[norms.Kept, ...]]:
    each = (norms.forward(_SUMS, epsilon, True, part, *of_part) for part, of_part in zip(parts, vectors, strict=True))
    return tuple(zip(*each, strict=True))


def _channel_sum(x: jax.Array) -> jax.Array:
    return x.sum(axis=(0, 1, 2))


_SUMS = norms.How(_channel_sum)
