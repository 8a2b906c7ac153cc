"""The loss of a training step, with weights of the classes, and what is counted beside it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpn_jax.finetune.config import FinetuneConfig

Metrics = dict[str, jax.Array]
"""Sums over a batch, scalars: divide `loss`, `correct` and `correct5` by `count`. Training adds `gradient_norm` and
`learning_rate`, which are not sums."""


def class_weights(
    config: FinetuneConfig, num_classes: int, labels: Sequence[int] | None = None
) -> tuple[float, ...] | None:
    """The weight of each class in the loss; None without weights.

    Args:
      config: only `class_weights` is used.
      num_classes: number of classes.
      labels: those of all training images, which 'balanced' counts.

    Returns:
      What `config` says, or for 'balanced' the inverse frequency of each class, scaled so that the mean over the
      training images is 1.

    Raises:
      ValueError: there are other numbers of weights and classes, or 'balanced' has no labels of a class.

    Example:
      >>> class_weights(FinetuneConfig(class_weights="balanced"), 2, [0, 0, 0, 1])
      (0.6666666666666666, 2.0)

    Source: `sklearn.utils.class_weight.compute_class_weight`.
    """
    chosen = config.class_weights
    if chosen == "none":
        return None
    if chosen != "balanced":
        if len(chosen) != num_classes:
            raise ValueError(f"class_weights must be one for each of the {num_classes} classes, got {len(chosen)}")
        return tuple(map(float, chosen))
    if labels is None:
        raise ValueError("class_weights='balanced' counts the training labels: TrainState.create(..., labels=labels)")
    counts = np.bincount(np.asarray(labels, np.int64), minlength=num_classes)
    if len(counts) > num_classes or not counts.all():
        wrong = num_classes if len(counts) > num_classes else int(np.argmin(counts))
        what = f"there are {num_classes} classes" if wrong == num_classes else "it has no training images"
        raise ValueError(f"class_weights='balanced' has no weight for class {wrong}: {what}")
    return tuple((counts.sum() / (num_classes * counts)).tolist())


def batch_metrics(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Metrics:
    """Loss and accuracy over a batch.

    With weights of the classes, w, the mean loss is the sum over images and classes of -w s log p, divided by the sum
    of w t, where t are the targets, s the smoothed ones and p the softmax of the logits. For one class per image that
    is `torch.nn.CrossEntropyLoss(weight=w, label_smoothing=)`; for targets that are mixed, torch would divide by the
    number of images. A factor on all weights changes nothing.

    Args:
      logits: `[B, K]`.
      targets: `[B, K]`, class probabilities; their dtype is that of the result.
      weights: `[B]`, how much each image counts.
      label_smoothing: fraction of the target that is spread evenly over all classes.
      class_weights: K weights; defaults to 1.

    Returns:
      `loss` (the mean loss times `count`), `correct`, `correct5` and `count`.
    """
    logits = logits.astype(targets.dtype)
    smooth = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1] if label_smoothing else targets
    count = weights.sum()
    if class_weights is None:
        loss = (weights * optax.softmax_cross_entropy(logits, smooth)).sum()
    else:
        scaled = jnp.asarray(class_weights, targets.dtype)
        sums = (weights * optax.softmax_cross_entropy(logits, scaled * smooth)).sum()
        loss = sums / (weights * (scaled * targets).sum(axis=1)).sum() * count
    labels = jax.lax.argmax(targets, 1, jnp.int32)
    hits = jax.lax.top_k(logits, min(5, logits.shape[1]))[1] == labels[:, None]
    return {
        "loss": loss,
        "correct": weights.sum(where=hits[:, 0]),
        "correct5": weights.sum(where=hits.any(axis=1)),
        "count": count,
    }
