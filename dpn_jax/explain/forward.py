"""What the explanations share: a model as a pure function, the classes that are meant, taps on what flows inside."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.model import DPN
from dpn_jax.operations import at_least_float32
from dpn_jax.stock import split_in_eval_mode

Classes = int | np.ndarray | jax.Array | list[int] | None
"""Which logit is explained: one class, one for each image, or None: the class with the largest logit."""
_TOP = -1

See = Callable[[Any], Any]
"""What a tap does with what flows by: returns it, or something else in its place."""


class Subject(NamedTuple):
    """What is explained: a model in eval mode in two halves, the structure hashable, and its checked arguments."""

    structure: nnx.GraphDef
    state: nnx.State
    images: jax.Array
    classes: jax.Array
    """int32 [B], -1 for the top class."""


def subject(model: nnx.Module, images: jax.Array | np.ndarray, classes: Classes = None) -> Subject:
    """Checks a model and its images, and which classes are asked for.

    Raises:
      ValueError: the model is no module or gives no row of logits for each image, the images do not fit it, or a class
        is out of its range; the message names the argument and the value.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model must be a module such as a DPN, got {model!r}")
    images = jnp.asarray(images)
    if isinstance(model, DPN):
        model.config.check_images(images.shape, images.dtype)
    elif images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be normalized floats [B, H, W, C], got {images.dtype} {list(images.shape)}")
    structure, state = split_in_eval_mode(model)
    logits = logits_of.eval_shape(structure, state, images)  # traced once for each shape
    if logits.ndim != 2:
        raise ValueError(f"model must give one row of logits for each image, got {list(logits.shape)} (global_pool='')")
    return Subject(structure, state, images, _checked_classes(classes, *logits.shape))


def _checked_classes(classes: Classes, batch: int, number: int) -> jax.Array:
    if classes is None:
        return jnp.full(batch, _TOP, jnp.int32)
    array = np.asarray(classes)
    if array.dtype.kind not in "iu" or array.shape not in ((), (batch,)):
        raise ValueError(f"classes must be None, an integer, or {batch} of them, one an image, got {classes!r}")
    if wrong := [int(index) for index in array.flat if not 0 <= index < number]:
        raise ValueError(f"classes must be in 0 to {number - 1}, got {wrong[0]}")
    return jnp.broadcast_to(jnp.asarray(array, jnp.int32), (batch,))


def chosen(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The classes that are meant, `[B]`, once the logits `[B, K]` are known."""
    return jnp.where(classes == _TOP, logits.argmax(axis=-1).astype(jnp.int32), classes)


def of_class(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Each image's logit `[B]` of its class, in at least float32."""
    logits = logits.astype(at_least_float32(logits.dtype))
    return jnp.take_along_axis(logits, chosen(logits, classes)[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames="structure")
def logits_of(structure: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    """The model's logits `[B, K]`."""
    return nnx.merge(structure, state)(images)


class _Tapped(nnx.Module):
    """A module, with a hand on what goes in and what comes out."""

    def __init__(self, module: nnx.Module, *, before: See | None = None, after: See | None = None) -> None:
        self.module, self.before, self.after = module, before, after

    def __call__(self, x: Any) -> Any:
        y = self.module(x if self.before is None else self.before(x))
        return y if self.after is None else self.after(y)


def tap_features(model: DPN, index: int | None, see: See) -> None:
    """Puts a tap behind the features of an index, as `forward_intermediates` counts, or None: those that are pooled.

    In place: `model` is a copy of the caller's.
    """
    model.remat = False  # what a tap keeps must not be computed within a rematerialized block
    if index is None:
        model.norm = _Tapped(model.norm, after=see)
    elif index == 0:
        model.stem = _Tapped(model.stem, after=see)
    else:
        model.stages[index - 1][-1] = _Tapped(model.stages[index - 1][-1], after=see)


def tap_blocks(model: DPN, see: Callable[[int, int, Any], Any]) -> None:
    """Puts a tap before each block: `see(stage, block, x)`. In place: `model` is a copy of the caller's."""
    model.remat = False
    for number, stage in enumerate(model.stages):
        for index, block in enumerate(stage):
            stage[index] = _Tapped(block, before=functools.partial(see, number, index))


def checked_index(model: nnx.Module, index: int | None) -> int | None:
    """An index of `feature_info`, counted from the start.

    Raises:
      ValueError: the model is not a DPN, or there is no such index.
    """
    if not isinstance(model, DPN):
        raise ValueError(f"model must be a DPN, whose features are known, got a {type(model).__name__}")
    if index is None:
        return None
    count = len(model.feature_info)
    if not isinstance(index, int) or isinstance(index, bool) or not -count <= index < count:
        raise ValueError(f"index must be None or in {-count} to {count - 1}, got {index!r}")
    return index % count


def sampling(length: int, positions: np.ndarray) -> np.ndarray:
    """A matrix `[len(positions), length]` that interpolates linearly; positions, in samples, are clamped."""
    positions = np.clip(positions, 0, length - 1)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(length)))
