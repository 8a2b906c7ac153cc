"""Whether a map explains anything: does it depend on the weights, and on what the network needs?"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.explain.forward import Classes, chosen, logits_of, subject
from dpn_jax.explain.gradients import broadcast_baseline
from dpn_jax.model import DPN
from dpn_jax.operations import at_least_float32


class Curve(NamedTuple):
    """How the probability of a class changes with the fraction of an image that is seen or gone."""

    fractions: np.ndarray
    """`[steps + 1]`, of the pixels, from 0 to 1."""
    probabilities: jax.Array
    """`[B, steps + 1]`, of the class."""
    area: jax.Array
    """`[B]`: below the curve, in [0, 1]."""


def insertion(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    maps: jax.Array | np.ndarray,
    classes: Classes = None,
    *,
    steps: int = 32,
    baseline: float | jax.Array | np.ndarray = 0.0,
) -> Curve:
    """The probability as pixels are put in, the map's largest first: a good map has a large area.

    Args:
      model: any module from images to logits.
      images: `[B, H, W, C]`, normalized floats.
      maps: `[B, H, W]`, from any explanation.
      classes: whose probability: one class, one for each image, or None for the most probable one.
      steps: how many points the curve has after the first.
      baseline: what there is at first, broadcast to `images`: 0 is the mean color, a blurred copy is common.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> images = jnp.ones((2, 32, 32, 3))
      >>> insertion(model, images, images[..., 0], steps=4).probabilities.shape
      (2, 5)

    Source: Petsiuk et al., 2018 (arXiv 1806.07421).
    """
    return _curve(model, images, maps, classes, steps, baseline, inserted=True)


def deletion(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    maps: jax.Array | np.ndarray,
    classes: Classes = None,
    *,
    steps: int = 32,
    baseline: float | jax.Array | np.ndarray = 0.0,
) -> Curve:
    """The probability as pixels are taken away, the map's largest first: a good map has a small area.

    Args:
      model, images, maps, classes, steps: as for `insertion`.
      baseline: what replaces them.

    Raises:
      ValueError: as `insertion`.

    Source: Petsiuk et al., 2018 (arXiv 1806.07421).
    """
    return _curve(model, images, maps, classes, steps, baseline, inserted=False)


def _curve(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    maps: jax.Array | np.ndarray,
    classes: Classes,
    steps: int,
    baseline: float | jax.Array | np.ndarray,
    *,
    inserted: bool,
) -> Curve:
    given = subject(model, images, classes)
    maps = jnp.asarray(maps)
    if maps.shape != given.images.shape[:3]:
        raise ValueError(f"maps must be {list(given.images.shape[:3])}, one for each image, got {list(maps.shape)}")
    if not 1 <= steps <= maps[0].size:
        raise ValueError(f"steps must be in 1 to {maps[0].size}, the pixels, got {steps!r}")
    baseline = broadcast_baseline(baseline, given.images)
    return Curve(np.linspace(0, 1, steps + 1), *_probabilities(*given, maps, baseline, steps, inserted))


@functools.partial(jax.jit, static_argnames=("structure", "steps", "inserted"))
def _probabilities(
    structure: nnx.GraphDef,
    state: nnx.State,
    images: jax.Array,
    classes: jax.Array,
    maps: jax.Array,
    baseline: jax.Array,
    steps: int,
    inserted: bool,
) -> tuple[jax.Array, jax.Array]:
    classes = chosen(logits_of(structure, state, images), classes)
    order = jnp.argsort(-maps.reshape(len(maps), -1), axis=1, stable=True)
    ranks = jnp.argsort(order, axis=1).reshape(maps.shape)
    numbers = np.rint(np.linspace(0, maps[0].size, steps + 1)).astype(np.int32)

    def probability(number: jax.Array) -> jax.Array:
        first = (ranks < number)[..., None]
        seen = jnp.where(first, images, baseline) if inserted else jnp.where(first, baseline, images)
        logits = logits_of(structure, state, seen)
        logits = logits.astype(at_least_float32(logits.dtype))
        return jnp.take_along_axis(jax.nn.softmax(logits), classes[:, None], axis=-1)[:, 0]

    probabilities = jax.lax.map(probability, jnp.asarray(numbers)).T
    return probabilities, jnp.trapezoid(probabilities, dx=1 / steps, axis=1)


def randomized(model: DPN, *, stages: int | None = None, seed: int = 0) -> DPN:
    """A copy whose last layers have forgotten what they learned: the sanity check of any explanation.

    Each kernel's values are shuffled, so that the layers keep their scale; norms stay. A map that hardly differs from
    the trained network's (`rank_correlation`) shows the image and not what the network makes of it.

    Args:
      model: a `DPN`, stock or changed.
      stages: how many stages, from the last one; the classifier is always among them. Defaults to all, and the stem.
      seed: of the shuffling.

    Returns:
      The copy.

    Raises:
      ValueError: the model has not so many stages.

    Example:
      >>> import dpn_jax
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> other = randomized(model, stages=0)
      >>> bool((other.stem.conv.kernel[...] == model.stem.conv.kernel[...]).all())
      True

    Source: Adebayo et al., 2018 (arXiv 1810.03292).
    """
    count = len(model.stages)
    if stages is not None and not 0 <= stages <= count:
        raise ValueError(f"stages must be None or in 0 to {count}, got {stages!r}")
    copy, key = nnx.clone(model), jax.random.key(seed)
    kept = [f"stages.{number}." for number in range(count - (count if stages is None else stages))]
    kept += ["stem."] if stages is not None else []
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(copy, nnx.Param))):
        value = variable.get_value()
        if value.ndim >= 2 and not ".".join(map(str, path)).startswith(tuple(kept)):
            shuffled = jax.random.permutation(jax.random.fold_in(key, number), value.reshape(-1))
            variable.set_value(shuffled.reshape(value.shape))
    return copy


def rank_correlation(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> np.ndarray:
    """How alike two maps of an image are in the order of their pixels: Spearman's correlation, ties at their mean rank.

    Args:
      a, b: `[B, H, W]`.

    Returns:
      float64 [B], in [-1, 1]; NaN where a map is constant.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> a = np.arange(8.0).reshape(2, 2, 2)
      >>> rank_correlation(a, -(a**3)).tolist()
      [-1.0, -1.0]
    """
    a, b = (np.asarray(maps, np.float64) for maps in (a, b))
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"a and b must be maps [B, H, W] of the same images, got {list(a.shape)} and {list(b.shape)}")
    from scipy import stats  # takes half a second

    ranks = (stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (a, b))
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
