"""How alike two layers are, and how far a feature sees."""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.blocks import join_paths
from dpn_jax.explain.forward import checked_index, subject, tap_features
from dpn_jax.model import DPN
from dpn_jax.operations import at_least_float32

Features = jax.Array | np.ndarray


def cka(a: Features | Iterable[Features], b: Features | Iterable[Features]) -> float:
    """How alike two representations of the same images are: linear centered kernel alignment, without bias.

    Args:
      a, b: features of the same images in the same order, `[N, ...]` each, such as two of `forward_intermediates`; or
        equally cut minibatches of them, in an iterable each. A minibatch has at least 4 images.

    Returns:
      1 for features that are equal up to rotation and scale, about 0 for independent ones (it may be negative). The
      minibatches' HSIC are summed before the ratio is taken; it is computed in at least float32.

    Raises:
      ValueError: other batches in `a` than in `b`, or fewer than 4 images in one, of which no unbiased estimate exists.

    Example:
      >>> features = np.random.default_rng(0).normal(size=(64, 8))
      >>> round(cka(features, 3 * features[:, ::-1] + 1), 5)
      1.0

    Source: Kornblith et al., 2019 (arXiv 1905.00414); unbiased, in minibatches: Nguyen et al., 2021 (arXiv 2010.15327).
    """
    sums = np.zeros(3)
    for one, other in itertools.zip_longest(_batches(a), _batches(b)):
        if one is None or other is None:
            raise ValueError("a and b must be features of the same images, got more batches of one than of the other")
        if len(one) != len(other):
            raise ValueError(f"a and b must be features of the same images, got {len(one)} and {len(other)} in a batch")
        if len(one) < 4:
            raise ValueError(f"a and b must have at least 4 images a batch for an unbiased estimate, got {len(one)}")
        sums += np.asarray(_hsics(jnp.asarray(one), jnp.asarray(other)), np.float64)
    return float(sums[0] / np.sqrt(sums[1] * sums[2]))


def _batches(features: Features | Iterable[Features]) -> Iterable[Features]:
    return [features] if isinstance(features, jax.Array | np.ndarray) else features


@jax.jit
def _hsics(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The unbiased HSIC of `a` with `b`, `a` with itself, and `b` with itself."""
    grams = []
    for features in (a, b):
        x = features.reshape(len(features), -1)
        x = x.astype(at_least_float32(x.dtype))
        x -= x.mean(axis=0)  # changes nothing but the rounding
        gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
        grams.append(gram * (1 - jnp.eye(len(x), dtype=x.dtype)))

    def hsic(k: jax.Array, m: jax.Array) -> jax.Array:
        n = len(k)
        total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()
        return total / (n * (n - 3))

    k, m = grams
    return hsic(k, m), hsic(k, k), hsic(m, m)


class ReceptiveField(NamedTuple):
    """What `receptive_field` returns."""

    map: jax.Array
    """`[H, W]`: how strongly each pixel moves the feature, over all images; the largest value is 1."""
    position: tuple[int, int]
    """Row and column of the feature."""
    center: tuple[int, int]
    """Row and column of the pixel that it lies on."""
    size: float
    """Pixels: the side of a square with as many pixels as have more than 4.55% of the largest value, which is what lies
    beyond two standard deviations of a Gaussian."""


def receptive_field(
    model: DPN,
    images: jax.Array | np.ndarray,
    *,
    index: int | None = None,
    position: tuple[int, int] | None = None,
    seed: int = 0,
) -> ReceptiveField:
    """How far a feature really sees: the gradients of its channels with respect to the pixels.

    Args:
      model: a `DPN`, stock or changed.
      images: `[B, H, W, C]`, normalized floats; more give a smoother map, and larger ones show all of it.
      index: which features, as `forward_intermediates` counts; None are those that are pooled.
      position: row and column of the feature; defaults to the middle.
      seed: of the random signs with which the channels are added, so that none outweighs the others.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> receptive_field(model, jnp.ones((1, 64, 64, 3)), index=1).center
      (32, 32)

    Source: Luo et al., 2016 (arXiv 1701.04128).
    """
    place = checked_index(model, index)
    given = subject(model, images)
    reduction = model.feature_info[-1 if place is None else place].reduction
    size = tuple(-(-side // reduction) for side in given.images.shape[1:3])
    position = tuple(side // 2 for side in size) if position is None else tuple(position)
    if len(position) != 2 or not all(0 <= at < side for at, side in zip(position, size, strict=True)):
        raise ValueError(f"position must be a row and a column within {list(size)}, got {position!r}")
    map = _field(given.structure, given.state, given.images, place, position, jax.random.key(seed))
    map = map / jnp.where(map.max() > 0, map.max(), 1)
    side = float((map > 0.0455).sum()) ** 0.5
    return ReceptiveField(map, position, tuple(at * reduction for at in position), side)


@functools.partial(jax.jit, static_argnames=("structure", "index", "position"))
def _field(
    structure: nnx.GraphDef,
    state: nnx.State,
    images: jax.Array,
    index: int | None,
    position: tuple[int, int],
    key: jax.Array,
) -> jax.Array:
    def feature(images: jax.Array) -> jax.Array:
        model, seen = nnx.merge(structure, state), []

        def see(features: jax.Array) -> jax.Array:
            seen.append(join_paths(features))
            return features

        tap_features(model, index, see)
        model(images)
        at = seen[0][:, *position]
        return (at * jax.random.rademacher(key, at.shape, at.dtype)).sum()

    gradients = jax.grad(feature)(images)
    gradients = gradients.astype(at_least_float32(gradients.dtype))
    return jnp.sqrt(jnp.square(gradients).mean(axis=(0, 3)))
