"""Which parts of an image the logit needs: those whose covering lowers it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.explain.forward import Classes, chosen, logits_of, of_class, subject
from dpn_jax.explain.gradients import broadcast_baseline


def occlusion(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    classes: Classes = None,
    *,
    window: int = 32,
    stride: int = 16,
    baseline: float | jax.Array | np.ndarray = 0.0,
) -> jax.Array:
    """How much the logit falls where a window covers the image.

    Args:
      model: any module from images to logits.
      images: `[B, H, W, C]`, normalized floats.
      classes: whose logit: one class, one for each image, or None for the largest one.
      window: side of the square that is covered, pixels.
      stride: pixels from one square to the next. Where they do not divide the image, its border cuts the last ones.
      baseline: what covers it, broadcast to `images`; 0 is the mean color.

    Returns:
      `[B, H, W]`: for each pixel the mean, over the windows that covered it, of the logit's fall; negative where
      covering helps.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> occlusion(model, jnp.zeros((2, 40, 64, 3)), window=16, stride=16).shape
      (2, 40, 64)

    Source: Zeiler and Fergus, 2014 (arXiv 1311.2901); `captum.attr.Occlusion`.
    """
    given = subject(model, images, classes)
    shortest = min(given.images.shape[1:3])
    if not 1 <= window <= shortest:
        raise ValueError(f"window must be in 1 to {shortest}, the images' shorter side, got {window!r}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in 1 to {window}, the window, or pixels would stay uncovered, got {stride!r}")
    return _occlusion(*given, broadcast_baseline(baseline, given.images), window, stride)


@functools.partial(jax.jit, static_argnames=("structure", "window", "stride"))
def _occlusion(
    structure: nnx.GraphDef,
    state: nnx.State,
    images: jax.Array,
    classes: jax.Array,
    baseline: jax.Array,
    window: int,
    stride: int,
) -> jax.Array:
    logits = logits_of(structure, state, images)
    classes = chosen(logits, classes)
    whole = of_class(logits, classes)
    rows, columns = (jnp.arange(length) for length in images.shape[1:3])

    def cover(sums: tuple[jax.Array, jax.Array], corner: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        inside = [
            (places >= start) & (places < start + window) for places, start in zip((rows, columns), corner, strict=True)
        ]
        mask = inside[0][:, None] & inside[1][None, :]
        covered = jnp.where(mask[:, :, None], baseline, images)
        fall = whole - of_class(logits_of(structure, state, covered), classes)
        return (sums[0] + jnp.where(mask, fall[:, None, None], 0), sums[1] + mask.astype(fall.dtype)), None

    starts = (range(0, math.ceil((length - window) / stride) * stride + 1, stride) for length in images.shape[1:3])
    nothing = (jnp.zeros(images.shape[:3], whole.dtype), jnp.zeros(images.shape[1:3], whole.dtype))
    (total, count), _ = jax.lax.scan(cover, nothing, jnp.asarray(list(itertools.product(*starts))))
    return total / count
