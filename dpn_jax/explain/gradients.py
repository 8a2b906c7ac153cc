"""Maps from gradients: saliency, integrated gradients, Grad-CAM and Grad-CAM++."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.blocks import join_paths
from dpn_jax.explain.forward import Classes, checked_index, chosen, logits_of, of_class, sampling, subject, tap_features
from dpn_jax.operations import at_least_float32


class IntegratedGradients(NamedTuple):
    """What `integrated_gradients` returns."""

    attributions: jax.Array
    """`[B, H, W, C]`: what each value contributes to the logit, compared with the baseline; the sum over the channels
    is a map for `overlay`."""
    error: jax.Array
    """`[B]`: how far their sum is from the difference of the two logits, as a fraction of it: 0.01 is one percent."""


def saliency(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    classes: Classes = None,
    *,
    samples: int = 1,
    noise: float = 0.15,
    seed: int = 0,
) -> jax.Array:
    """How strongly each pixel moves the logit: the largest gradient of its channels, without its sign.

    Without a sign it shows much of the image itself: look at the map of a `randomized` network beside it.

    Args:
      model: any module from images to logits.
      images: `[B, H, W, C]`, normalized floats.
      classes: whose logit: one class, one for each image, or None for the largest one.
      samples: more than one is SmoothGrad: the mean of the gradients at so many noisy copies of each image.
      noise: standard deviation of that noise, as a fraction of the image's range.
      seed: of the noise.

    Returns:
      `[B, H, W]`, at least 0.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> saliency(model, jnp.zeros((2, 48, 64, 3))).shape
      (2, 48, 64)

    Source: Simonyan et al., 2013 (arXiv 1312.6034); SmoothGrad: Smilkov et al., 2017 (arXiv 1706.03825).
    """
    if samples < 1 or not noise >= 0:
        raise ValueError(f"samples must be at least 1 and noise at least 0, got {samples!r} and {noise!r}")
    return _saliency(*subject(model, images, classes), samples, noise if samples > 1 else 0.0, jax.random.key(seed))


@functools.partial(jax.jit, static_argnames=("structure", "samples"))
def _saliency(
    structure: nnx.GraphDef,
    state: nnx.State,
    images: jax.Array,
    classes: jax.Array,
    samples: int,
    noise: float,
    key: jax.Array,
) -> jax.Array:
    classes = chosen(logits_of(structure, state, images), classes)
    gradient = _gradient_of_logit(structure, state, classes)
    spread = jnp.asarray(noise, images.dtype) * (images.max((1, 2, 3)) - images.min((1, 2, 3)))[:, None, None, None]

    def add(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        return total + gradient(images + spread * jax.random.normal(key, images.shape, images.dtype)), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(images), jax.random.split(key, samples))
    return jnp.abs(total / samples).max(axis=-1)


def integrated_gradients(
    model: nnx.Module,
    images: jax.Array | np.ndarray,
    classes: Classes = None,
    *,
    baseline: float | jax.Array | np.ndarray = 0.0,
    steps: int = 50,
) -> IntegratedGradients:
    """What each value contributes to the logit: the gradients on the way from a baseline to the image, added up.

    Args:
      model, images, classes: as for `saliency`.
      baseline: what an image without content is, broadcast to `images`. The default 0 is, after normalization, the mean
        color, not black: that is `(0 - mean) / std` of the model's preprocessing.
      steps: gradients for each image, at the nodes of Gauss and Legendre. Each ReLU is a kink on the way: 50 are within
        some percent, a few hundred within one.

    Returns:
      The attributions and how complete they are: with too few steps the error is large.

    Raises:
      ValueError: an argument does not fit; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> found = integrated_gradients(model, jnp.ones((2, 32, 32, 3)), 1)
      >>> found.attributions.shape, bool((found.error < 0.01).all())
      ((2, 32, 32, 3), True)

    Source: Sundararajan et al., 2017 (arXiv 1703.01365).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    given = subject(model, images, classes)
    return _integrated_gradients(*given, broadcast_baseline(baseline, given.images), steps)


@functools.partial(jax.jit, static_argnames=("structure", "steps"))
def _integrated_gradients(
    structure: nnx.GraphDef,
    state: nnx.State,
    images: jax.Array,
    classes: jax.Array,
    baseline: jax.Array,
    steps: int,
) -> IntegratedGradients:
    logits = logits_of(structure, state, images)
    classes = chosen(logits, classes)
    gradient = _gradient_of_logit(structure, state, classes)
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]

    def add(total: jax.Array, node_and_weight: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        node, weight = node_and_weight
        return total + weight * gradient(baseline + node * (images - baseline)), None

    along = (jnp.asarray((nodes + 1) / 2, images.dtype), jnp.asarray(weights / 2, images.dtype))
    total, _ = jax.lax.scan(add, jnp.zeros_like(images), along)
    attributions = total * (images - baseline)
    expected = of_class(logits, classes) - of_class(logits_of(structure, state, baseline), classes)
    found = attributions.astype(expected.dtype).sum((1, 2, 3))
    return IntegratedGradients(
        attributions, jnp.abs(found - expected) / jnp.maximum(jnp.abs(expected), jnp.finfo(expected.dtype).tiny)
    )


def _gradient_of_logit(
    structure: nnx.GraphDef, state: nnx.State, classes: jax.Array
) -> "functools.partial[jax.Array] | jax.stages.Wrapped":
    return jax.grad(lambda images: of_class(logits_of(structure, state, images), classes).sum())


def grad_cam(
    model: nnx.Module, images: jax.Array | np.ndarray, classes: Classes = None, *, index: int | None = None
) -> jax.Array:
    """Where in the image features speak for the class: a mean of feature maps, weighted by their mean gradients.

    Args:
      model: a `DPN`, stock or changed.
      images: `[B, H, W, C]`, normalized floats.
      classes: whose logit: one class, one for each image, or None for the largest one.
      index: which features, as `forward_intermediates` counts; None takes those that are pooled, after the last norm
        and activation.

    Returns:
      `[B, H, W]`, at least 0: interpolated between the features, each of which lies at its own pixel, a multiple of the
      reduction. (Resizing a map as an image would shift it by half a reduction, 15.5 pixels.)

    Raises:
      ValueError: an argument does not fit; or the features are a single one, so that there is nothing to localize.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> grad_cam(model, jnp.zeros((2, 48, 64, 3))).shape
      (2, 48, 64)

    Source: Selvaraju et al., 2017 (arXiv 1610.02391).
    """
    features, gradients, reduction = _features_and_gradients(model, images, classes, index)
    weights = gradients.mean(axis=(1, 2), keepdims=True)
    return _to_pixels(nnx.relu((weights * features).sum(-1)), reduction, np.shape(images)[1:3])


def grad_cam_plus_plus(
    model: nnx.Module, images: jax.Array | np.ndarray, classes: Classes = None, *, index: int | None = None
) -> jax.Array:
    """As `grad_cam`, with weights that give each instance of the class in the image its part.

    Args:
      model, images, classes, index: as for `grad_cam`.

    Returns:
      As `grad_cam`.

    Raises:
      ValueError: as `grad_cam`.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> grad_cam_plus_plus(model, jnp.zeros((2, 48, 64, 3)), index=3).shape
      (2, 48, 64)

    Source: Chattopadhyay et al., 2018 (arXiv 1710.11063), equations 10 and 19.
    """
    features, gradients, reduction = _features_and_gradients(model, images, classes, index)
    square = gradients**2
    below = 2 * square + features.sum(axis=(1, 2), keepdims=True) * gradients**3
    alphas = jnp.where(below == 0, 0, square / jnp.where(below == 0, 1, below))
    weights = (alphas * nnx.relu(gradients)).sum(axis=(1, 2), keepdims=True)
    return _to_pixels(nnx.relu((weights * features).sum(-1)), reduction, np.shape(images)[1:3])


def _features_and_gradients(
    model: nnx.Module, images: jax.Array | np.ndarray, classes: Classes, index: int | None
) -> tuple[jax.Array, jax.Array, int]:
    """The features of an index and the gradients of the logit, `[B, h, w, c]` each, and the features' reduction."""
    place = checked_index(model, index)
    given = subject(model, images, classes)
    features, gradients = _at_features(*given, place)
    if features.shape[1:3] == (1, 1):
        size = " x ".join(map(str, given.images.shape[1:3]))
        raise ValueError(f"index {index} gives a single feature for images of {size}; choose an earlier one")
    return features, gradients, model.feature_info[-1 if place is None else place].reduction


@functools.partial(jax.jit, static_argnames=("structure", "index"))
def _at_features(
    structure: nnx.GraphDef, state: nnx.State, images: jax.Array, classes: jax.Array, index: int | None
) -> tuple[jax.Array, jax.Array]:
    def run(added: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(structure, state)
        seen = []

        def see(features: jax.Array) -> jax.Array:
            seen.append(features if added is None else jax.tree.map(jnp.add, features, added))
            return seen[-1]

        tap_features(model, index, see)
        return of_class(model(images), classes).sum(), seen[-1]

    _, shapes = jax.eval_shape(lambda: run(None))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    gradients, features = jax.grad(run, has_aux=True)(nothing)
    maps = map(join_paths, (features, gradients))
    return tuple(x.astype(at_least_float32(x.dtype)) for x in maps)


def _to_pixels(maps: jax.Array, reduction: int, size: tuple[int, int]) -> jax.Array:
    rows, columns = (
        jnp.asarray(sampling(length, np.arange(pixels) / reduction), maps.dtype)
        for length, pixels in zip(maps.shape[1:], size, strict=True)
    )
    return jnp.einsum("yi,bij,xj->byx", rows, maps, columns, precision=jax.lax.Precision.HIGHEST)


def broadcast_baseline(baseline: float | jax.Array | np.ndarray, images: jax.Array) -> jax.Array:
    """`baseline` as images.

    Raises:
      ValueError: it does not fit.
    """
    try:
        return jnp.broadcast_to(jnp.asarray(baseline, images.dtype), images.shape)
    except (ValueError, TypeError) as error:
        shape = list(np.shape(baseline))
        raise ValueError(f"baseline must broadcast to the images {list(images.shape)}, got {shape}") from error
