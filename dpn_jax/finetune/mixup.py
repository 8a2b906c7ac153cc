"""Mixup and cutmix of a batch, as part of the compiled step."""

import jax
import jax.numpy as jnp


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image and its target with those at the mirrored position of the batch.

    Mixup blends the two images, cutmix replaces a rectangle. With both, each batch gets one of the two with equal
    probability. The mixing ratio is drawn once per batch; that of cutmix is the fraction of the area that is kept after
    the rectangle is clipped at the border.

    Args:
      key: the random key.
      images: floats `[B, H, W, C]`.
      targets: class probabilities `[B, K]`.
      mixup, cutmix: alpha of the beta distribution of the mixing ratio; 0 is off.

    Returns:
      Mixed images and targets.

    Source: `timm.data.mixup.Mixup`; arXiv 1710.09412, 1905.04899.
    """
    if not (mixup or cutmix):
        return images, targets
    choice, draw, corner = jax.random.split(key, 3)
    cuts = jax.random.bernoulli(choice) if mixup and cutmix else jnp.asarray(bool(cutmix))
    alpha = jnp.where(cuts, cutmix, mixup).astype(targets.dtype)
    # beta(alpha, alpha); jax.random.beta would compile a second sampler for its second number
    ratio = jax.random.dirichlet(draw, jnp.stack([alpha, alpha]), dtype=targets.dtype)[0]
    kept = ratio
    if cutmix:
        outside = _outside_box(corner, ratio, *images.shape[1:3]).astype(targets.dtype)
        kept = jnp.where(cuts, outside, ratio)[:, :, None]
        ratio = jnp.where(cuts, outside.mean(), ratio)
    kept = kept.astype(images.dtype)
    return kept * images + (1 - kept) * images[::-1], ratio * targets + (1 - ratio) * targets[::-1]


def _outside_box(key: jax.Array, area: jax.Array, height: int, width: int) -> jax.Array:
    """False in a rectangle of `1 - area` of the image around a random pixel, clipped at the border: `[H, W]`."""
    side = jnp.sqrt(1 - area)
    inside = []
    for axis_key, length in zip(jax.random.split(key), (height, width), strict=True):
        half = (length * side).astype(jnp.int32) // 2
        center = jax.random.randint(axis_key, (), 0, length)
        places = jnp.arange(length, dtype=jnp.int32)
        inside.append((places >= center - half) & (places < center + half))
    return ~(inside[0][:, None] & inside[1])
