"""A model's parameters, folded for inference.

A norm that directly follows a convolution becomes part of it, 1x1 kernels are split by the path that they read, and
grouped kernels are packed as the plan's formulation reads them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.blocks import DualPathBlock, Expand
from dpn_jax.config import StageConfig
from dpn_jax.fast.plan import Plan
from dpn_jax.layers import NormAct, NormActConv
from dpn_jax.model import DPN


class Affine(NamedTuple):
    """A norm in eval mode: `x * scale + shift`."""

    scale: jax.Array
    shift: jax.Array


class Unit(NamedTuple):
    """Norm, activation, 1x1 convolution over one or both paths; the norm that follows is folded in."""

    norms: tuple[Affine, ...]
    """One for each path that is read."""
    kernels: tuple[tuple[jax.Array, ...], ...]
    """`[I, O]` for each output and each path that is read."""
    bias: jax.Array | None = None


class Block(NamedTuple):
    """One block's folded parameters."""

    shortcut: Unit | None
    reduce: Unit
    grouped: jax.Array
    grouped_bias: jax.Array
    expand: tuple[jax.Array, jax.Array]
    """`[I, O]` for what is added to the residual path, and for what is appended to the dense one."""


class Folded(NamedTuple):
    """The whole network's folded parameters."""

    stem: jax.Array
    stem_bias: jax.Array
    stages: tuple[tuple[Block, ...], ...]
    norms: tuple[Affine, ...]
    classifier: tuple[jax.Array, jax.Array] | None


def fold(model: DPN, plan: Plan, *, donate: bool = False) -> Folded:
    """A model's parameters for `FastForward.apply`, computed in float32 at least and then cast to the model's dtype."""

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.ascontiguousarray(array).astype(model.dtype))

    def affines(norm: NormAct, cuts: list[int]) -> tuple[Affine, ...]:
        scale, shift = _affine(norm)
        pairs = zip(np.split(scale, cuts), np.split(shift, cuts), strict=True)
        return tuple(Affine(cast(scale), cast(shift)) for scale, shift in pairs)

    def unit(
        source: NormActConv,
        cuts: list[int],
        *,
        outputs: list[int],
        following: NormAct | None = None,
        to_layout: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Unit:
        kernel, bias = _as_float32(source.conv.kernel)[0, 0], None
        if following is not None:
            scale, shift = _affine(following)
            kernel, bias = to_layout(kernel * scale), cast(to_layout(shift))
        kernels = tuple(tuple(map(cast, np.split(part, cuts))) for part in np.split(kernel, outputs, axis=1))
        return Unit(affines(source.norm, cuts), kernels, bias)

    def folded_block(stage: StageConfig, block: DualPathBlock, cuts: list[int]) -> Block:
        formulation = plan.formulation(stage.bottleneck // stage.groups)
        to_layout = functools.partial(formulation.to_layout, groups=stage.groups)
        scale, shift = _affine(block.expand.norm)
        return Block(
            shortcut=None if block.shortcut is None else unit(block.shortcut, cuts, outputs=[stage.residual]),
            reduce=unit(block.reduce, cuts, outputs=[], following=block.grouped.norm, to_layout=to_layout),
            grouped=cast(formulation.pack_kernel(_as_float32(block.grouped.conv.kernel) * scale, stage.groups)),
            grouped_bias=cast(to_layout(shift)),
            expand=tuple(cast(to_layout(kernel, axis=0)) for kernel in _expand_kernels(block.expand)),
        )

    scale, shift = _affine(model.stem.norm)
    cuts: list[int] = []  # where the residual path ends in what a block reads; the stem's output is one map
    stages = []
    for stage, blocks in zip(model.config.stages, model.stages, strict=True):
        folded_blocks = []
        for block in blocks:
            folded_blocks.append(folded_block(stage, block, cuts))
            if donate:
                for array in jax.tree.leaves(jax.block_until_ready((folded_blocks[-1], nnx.state(block)))[1]):
                    array.delete()
            cuts = [stage.residual]
        stages.append(tuple(folded_blocks))
    head = model.classifier
    return Folded(
        stem=cast(_as_float32(model.stem.conv.kernel) * scale),
        stem_bias=cast(shift),
        stages=tuple(stages),
        norms=affines(model.norm, cuts),
        classifier=None if head is None else (cast(_as_float32(head.kernel)[0, 0]), cast(_as_float32(head.bias))),
    )


def _affine(norm: NormAct) -> tuple[np.ndarray, np.ndarray]:
    """`NormAct` in eval mode as `x * scale + shift`."""
    scale = _as_float32(norm.scale) / np.sqrt(_as_float32(norm.var) + norm.epsilon)
    return scale, _as_float32(norm.bias) - _as_float32(norm.mean) * scale


def _as_float32(variable: nnx.Variable) -> np.ndarray:
    array = np.asarray(variable.get_value())
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def _expand_kernels(expand: Expand) -> list[np.ndarray]:
    kernel = np.concatenate([_as_float32(conv.kernel)[0, 0] for conv in expand.convolutions], axis=1)
    return np.split(kernel, [expand.residual_channels], axis=1)
