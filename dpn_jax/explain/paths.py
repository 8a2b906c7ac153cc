"""What the residual and the dense path contribute, block by block, and the network without a part of them.

A dense feature's *age* is how many blocks ago it was made when a block reads it: 1 for what the block before appended.
What a stage's first block starts the dense path with counts as that block's.
"""

import functools
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.blocks import DualPath, join_paths
from dpn_jax.config import StageConfig
from dpn_jax.explain.forward import Classes, chosen, subject, tap_blocks
from dpn_jax.layers import NormAct, NormActConv
from dpn_jax.model import DPN
from dpn_jax.operations import at_least_float32


class Shares(NamedTuple):
    """How something splits up between the paths; the two sum to 1."""

    residual: float
    dense: float
    by_age: np.ndarray
    """float64 [age]: of the dense features that were made 1, 2, ... blocks ago; sums to `dense`."""


class PathShares(NamedTuple):
    """What one block reads from the two paths, over all images and pixels."""

    stage: int
    """Index of the stage, from 0."""
    block: int
    """The block is `model.stages[stage][block]`."""
    input: Shares
    """Of the squared norm of what it reads."""
    preactivation: Shares
    """Of the variance of what its first convolution makes of it: what of that co-varies with the path's contribution.
    One that works against the other has a negative share."""
    gradient: Shares
    """Of the squared norm of the loss's gradient with respect to what it reads."""


def path_shares(model: DPN, images: jax.Array | np.ndarray, classes: Classes = None) -> list[PathShares]:
    """How much each block takes from the residual and from the dense path.

    Args:
      model: a `DPN` whose blocks hand what they read to their `reduce`, a norm and a 1x1 convolution, as
        `DualPathBlock` does.
      images: `[B, H, W, C]`, normalized floats; a few dozen give steady figures.
      classes: the labels of the loss, a cross-entropy; None are the classes with the largest logits.

    Returns:
      For each block, in the network's order; not the very first, which reads the stem.

    Raises:
      ValueError: an argument does not fit, or a block is of another kind; the message names it.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> shares = path_shares(model, jnp.ones((2, 64, 64, 3)))[0]
      >>> shares.stage, shares.block, round(shares.input.residual + shares.input.dense, 6)
      (1, 0, 1.0)
    """
    if not isinstance(model, DPN):
        raise ValueError(f"model must be a DPN, which has two paths, got a {type(model).__name__}")
    for stage, block, _ in _readers(model):
        if not isinstance(getattr(model.stages[stage][block], "reduce", None), NormActConv):
            raise ValueError(
                f"stages.{stage}.{block} has no reduce with a norm and a convolution, as a DualPathBlock has"
            )
    measured = _measure(*subject(model, images, classes))
    shares = []
    for (stage, block, ages), (norm, variance, gradient) in zip(_readers(model), measured, strict=True):
        shares.append(PathShares(stage, block, *(_shares(values, ages) for values in (norm, variance, gradient))))
    return shares


def _shares(of_channels: jax.Array, ages: np.ndarray) -> Shares:
    values = np.asarray(of_channels, np.float64)
    values = values / (values.sum() or 1)
    by_age = np.bincount(ages, values)
    return Shares(float(by_age[0]), float(by_age[1:].sum()), by_age[1:])


@functools.partial(jax.jit, static_argnames="structure")
def _measure(
    structure: nnx.GraphDef, state: nnx.State, images: jax.Array, classes: jax.Array
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """For each block but the first: squared norm, the variance and the squared gradient, `[C]` each."""

    def run(added: list[DualPath] | None) -> tuple[jax.Array, list[DualPath]]:
        model, read = nnx.merge(structure, state), []

        def see(stage: int, block: int, x: DualPath | jax.Array) -> DualPath | jax.Array:
            if not isinstance(x, DualPath):  # the stem's
                return x
            read.append(x if added is None else jax.tree.map(jnp.add, x, added[len(read)]))
            return read[-1]

        tap_blocks(model, see)
        logits = model(images)
        logits = logits.astype(at_least_float32(logits.dtype))
        labels = chosen(jax.lax.stop_gradient(logits), classes)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1).sum(), read

    _, shapes = jax.eval_shape(lambda: run(None))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    gradients, read = jax.grad(run, has_aux=True)(nothing)
    model = nnx.merge(structure, state)
    blocks = [block for stage in model.stages for block in stage][1:]
    return [
        (_square(x), _variance(block.reduce, x), _square(gradient))
        for block, x, gradient in zip(blocks, read, gradients, strict=True)
    ]


def _square(x: DualPath) -> jax.Array:
    x = join_paths(x)
    return jnp.square(x.astype(at_least_float32(x.dtype))).sum(axis=(0, 1, 2))


def _variance(reduce: NormActConv, x: DualPath) -> jax.Array:
    """Each channel's part of the summed variance of the convolution's outputs: their covariance with its products."""
    kernel = reduce.conv.kernel[...][0, 0]
    dtype = at_least_float32(kernel.dtype)
    activated = join_paths(reduce.norm(x)).reshape(-1, kernel.shape[0]).astype(dtype)
    activated -= activated.mean(axis=0)
    kernel = kernel.astype(dtype)
    exactly = {"precision": jax.lax.Precision.HIGHEST}
    outputs = jnp.matmul(activated, kernel, **exactly)
    return (kernel * jnp.matmul(activated.T, outputs, **exactly)).sum(axis=1)


def ablate(
    model: DPN,
    *,
    path: Literal["residual", "dense"] | None = None,
    older_than: int | None = None,
    stages: Collection[int] | None = None,
    fill: Literal["mean", "zero"] = "mean",
) -> DPN:
    """The network without one of its paths, or without the older dense features: nobody reads them any more.

    The paths stay, but the norms through which blocks (and the head) read what is left out give a constant there.
    Nothing is trained again. The copy of a stock model is stock: it classifies, evaluates and exports as any other.

    Args:
      model: a `DPN` whose blocks read through a `NormAct`, as `DualPathBlock` does.
      path: leave out all of it.
      older_than: leave out the dense features that were made more than so many blocks ago.
      stages: only of these stages, as in `model.stages`, counted from 0; defaults to all.
      fill: 'mean': each feature stands at its running mean; 'zero': it contributes nothing to the convolution.

    Returns:
      A copy, in the mode of the model.

    Raises:
      ValueError: neither or both of `path` and `older_than`, or an argument or a block that does not fit.

    Example:
      >>> import dpn_jax
      >>> model = dpn_jax.from_pretrained("dpn_tiny.digits")
      >>> without = ablate(model, path="dense", stages=[1])
      >>> int((without.stages[1][1].reduce.norm.scale[...] == 0).sum())
      24
    """
    if not isinstance(model, DPN):
        raise ValueError(f"model must be a DPN, which has two paths, got a {type(model).__name__}")
    if (path is None) == (older_than is None):
        raise ValueError(f"give one of path and older_than, got path={path!r}, older_than={older_than!r}")
    if path not in (None, "residual", "dense"):
        raise ValueError(f"path must be 'residual' or 'dense', got {path!r}")
    if older_than is not None and (not isinstance(older_than, int) or older_than < 0):
        raise ValueError(f"older_than must be an integer of at least 0, blocks, got {older_than!r}")
    if fill not in ("mean", "zero"):
        raise ValueError(f"fill must be 'mean' or 'zero', got {fill!r}")
    chosen_stages = set(range(len(model.stages)) if stages is None else stages)
    if wrong := chosen_stages - set(range(len(model.stages))):
        raise ValueError(f"stages must be in 0 to {len(model.stages) - 1}, got {min(wrong)!r}")

    copy = nnx.clone(model)
    for stage, block, ages in _readers(model, head=True):
        made_in = stage if block else stage - 1  # a stage's first block reads the one before
        if made_in not in chosen_stages:
            continue
        gone = ages == 0 if path == "residual" else ages > (older_than or 0)
        for name, norm in _norms_of_reader(copy, stage, block):
            if not isinstance(norm, NormAct) or norm.scale.shape != ages.shape:
                raise ValueError(f"{name} must be a NormAct of {len(ages)} channels, got a {type(norm).__name__}")
            norm.scale.set_value(jnp.where(gone, 0, norm.scale[...]))
            if fill == "zero":
                norm.bias.set_value(jnp.where(gone, 0, norm.bias[...]))
    return copy


def _readers(model: DPN, *, head: bool = False) -> Iterator[tuple[int, int, np.ndarray]]:
    """Stage and block of whatever reads both paths, and the age of each channel it reads; of the residual path's 0.

    Args:
      model: the model.
      head: also of the last norm, as the first block of one more stage.
    """
    before: StageConfig | None = None
    for number, stage in enumerate(model.config.stages):
        if before is not None:
            yield number, 0, _ages(before, before.depth)
        for block in range(1, stage.depth):
            yield number, block, _ages(stage, block)
        before = stage
    if head:
        yield len(model.config.stages), 0, _ages(before, before.depth)


def _ages(stage: StageConfig, block: int) -> np.ndarray:
    """int [C]: of what block number `block` of a stage reads, or whatever follows its last one."""
    dense = [block] * (2 * stage.increment)  # from the first block's `shortcut`
    for maker in range(block):
        dense += [block - maker] * stage.increment
    return np.array([0] * stage.residual + dense)


def _norms_of_reader(model: DPN, stage: int, block: int) -> Iterator[tuple[str, object]]:
    if stage == len(model.stages):
        yield "norm", model.norm
        return
    for unit in ("reduce", "shortcut") if block == 0 else ("reduce",):
        name = f"stages.{stage}.{block}.{unit}.norm"
        yield name, getattr(getattr(model.stages[stage][block], unit, None), "norm", None)
